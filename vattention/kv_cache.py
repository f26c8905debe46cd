"""The KV cache in Python: arguments, layouts and tensors over the native allocator."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from vattention import _native
from vattention.arguments import (
    byte_count,
    default_page_bytes,
    element_bytes,
    flag,
    in_range,
    open_device,
    positive,
    share_of_one,
)
from vattention.errors import DeviceError
from vattention.regions import Region
from vattention.stats import CacheStats

if TYPE_CHECKING:
    import torch


class VirtualKVCache:
    """K and V of every layer in reserved address space, with physical pages behind the tokens that exist.

    Layouts. Per layer: 2 * num_layers regions, a token is num_kv_heads * head_size elements in each. Megacache: one
    region for K and one for V, a token holds all layers, so a page holds fewer tokens and less of it is wasted.
    A row is one page at the same offset of every region, and the unit of account.

    Promise: any lengths of the allocated slots with sum(rows_for(length)) <= capacity_rows can be prepared, taking
    back rows from idle slots first and then rows mapped ahead. `prefetch` and `map_ahead` never break it.

    Threads may share a cache. A forked process may not use its parent's: every call but `close` raises ForkError there,
    and reading its tensors is SIGSEGV.

    Args:
        num_layers, num_kv_heads, head_size: the model's; K and V of a token are num_kv_heads * head_size elements.
        num_slots: sequences that can be in the cache at once.
        max_tokens: longest length of a slot. Slots and tokens cost address space, not memory.
        dtype: a torch dtype, its name ("bfloat16"), or any object with an `itemsize` of at least one byte.
        device: "cpu", "cuda", "cuda:1", a CUDA index, or a torch.device.
        budget_bytes: physical memory for K and V together; whole rows of it are used.
        page_bytes: a multiple of the device's granularity, at least one token. Default: 64 KiB on the CPU, the
            granularity of the driver on CUDA (2 MiB on present GPUs).
        megacache: the layout, see above.
        deferred_reclamation: a freed slot keeps its pages until they are needed (Section 6 of the vAttention paper).
        reclaim_threshold: share of the budget that the worker keeps free, after each prefetch taking back a few rows
            from idle slots.
        max_extent_rows: rows of an extent at most: 1, 4, 16 or 64. Less than 64: no extent straddles a multiple of it
            within its slot, so that shares and trims end there exactly on CUDA too.

    Raises ValueError or TypeError for arguments out of range, DeviceError if the device refuses.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        num_slots: int,
        max_tokens: int,
        dtype: torch.dtype | str,
        device: str | int | torch.device = "cpu",
        budget_bytes: int,
        page_bytes: int | None = None,
        megacache: bool = False,
        deferred_reclamation: bool = True,
        reclaim_threshold: float = 0.1,
        max_extent_rows: int = 64,
    ) -> None:
        self.num_layers, self.num_kv_heads = positive("num_layers", num_layers), positive("num_kv_heads", num_kv_heads)
        self.head_size, self.num_slots = positive("head_size", head_size), positive("num_slots", num_slots)
        self.max_tokens, self.megacache = positive("max_tokens", max_tokens), flag("megacache", megacache)
        budget_bytes = byte_count("budget_bytes", budget_bytes)
        policy = _native.Policy(
            deferred_reclamation=flag("deferred_reclamation", deferred_reclamation),
            reclaim_threshold=share_of_one("reclaim_threshold", reclaim_threshold),
            max_extent_rows=positive("max_extent_rows", max_extent_rows),
        )
        self.dtype, memory = dtype, open_device(device)
        self.num_regions = 2 if megacache else 2 * self.num_layers
        elements = self.num_kv_heads * self.head_size * (self.num_layers if megacache else 1)
        self.token_bytes = byte_count("bytes of a token in a region", elements * element_bytes(dtype))
        page_bytes = default_page_bytes(memory) if page_bytes is None else page_bytes
        self.page_bytes = byte_count("page_bytes", page_bytes, least=1)
        self.row_bytes = self.num_regions * self.page_bytes
        try:
            self._native = _native.KVCache(
                device=memory,
                num_regions=self.num_regions,
                token_bytes=self.token_bytes,
                num_slots=self.num_slots,
                max_tokens=self.max_tokens,
                page_bytes=self.page_bytes,
                budget_bytes=budget_bytes,
                policy=policy,
            )
        except DeviceError as error:  # of the device it only asks addresses; pages come later
            raise DeviceError(
                f"{num_slots} slots of {max_tokens} tokens take more addresses than the device has: {error}"
            ) from error
        self._tensors: tuple[torch.Tensor, ...] = ()  # the regions as torch sees them, from their first use to close()
        self._is_closed = False

    def __repr__(self) -> str:
        layout = "megacache" if self.megacache else "per layer"
        return (
            f"VirtualKVCache({self.num_layers} layers x {self.num_kv_heads} heads x {self.head_size} {self.dtype}, "
            f"{layout}, {self.num_slots} slots x {self.max_tokens} tokens, pages of {self.page_bytes} bytes"
            f"{', closed' if self._is_closed else ''})"
        )

    @property
    def capacity_rows(self) -> int:
        """Rows of the budget; changes with `resize`."""
        return self._native.capacity_rows()

    def rows_for(self, tokens: int) -> int:
        """Rows that `tokens` tokens of one slot take: ceil(tokens * token_bytes / page_bytes).

        Raises ValueError for more than max_tokens, or less than none.
        """
        return self._native.rows_for(in_range("tokens", tokens, 0, self.max_tokens))

    def view(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer at one slot, each [prepared tokens, num_kv_heads, head_size]: all of it may be touched.

        They are views: writes reach the cache. They keep their length when the slot grows, and must not be touched any
        more once the slot is freed. Raises ValueError for a slot that is not allocated.
        """
        is_allocated, tokens, _ = self._native.slot_state(slot)
        if not is_allocated:
            raise ValueError(f"slot {slot} is not allocated")
        k, v = self.layer(in_range("layer", layer, 0, self.num_layers - 1))
        return k[slot, :tokens], v[slot, :tokens]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [num_slots, max_tokens, num_kv_heads, head_size], strided: what kernels take.

        Only prepared tokens may be touched, and printing is touching: elsewhere the CPU gets SIGSEGV (see
        `report_faults`) and CUDA error 700. `view` is cut to them. Pages come with whatever their last owner left in
        them, so a kernel must not read past a sequence's length.
        """
        index = in_range("layer index", index, 0, self.num_layers - 1)
        shape = (self.num_kv_heads, self.head_size)
        if self.megacache:
            offset = index * self.num_kv_heads * self.head_size
            return self._view(0, shape, offset), self._view(1, shape, offset)
        return self._view(index, shape), self._view(self.num_layers + index, shape)

    def tensors(self) -> list[torch.Tensor]:
        """The regions as tensors, K first and then V.

        Per layer: 2 * num_layers of [num_slots, max_tokens, num_kv_heads, head_size]. Megacache: two of
        [num_slots, max_tokens, num_layers, num_kv_heads, head_size].
        """
        heads = (self.num_kv_heads, self.head_size)
        shape = (self.num_layers, *heads) if self.megacache else heads
        return [self._view(region, shape) for region in range(self.num_regions)]

    def regions(self) -> list[Region]:
        """The regions as bytes for any library that takes DLPack (`numpy.from_dlpack`, `jax.dlpack.from_dlpack`).

        K of every layer first and then V. Token t of slot s begins at byte s * slot_bytes + t * token_bytes of each.
        """
        return [Region(self._native, index) for index in range(self.num_regions)]

    @property
    def slot_bytes(self) -> int:
        """Distance of two slots in a region, a multiple of page_bytes."""
        return self._native.slot_bytes

    def alloc(self, tokens: int = 0) -> int:
        """An idle slot, the one whose rows serve `tokens` tokens best. Calls no driver; maps nothing.

        Rows that cannot serve this length stay mapped until their place or their memory is needed.
        Raises NoFreeSlotError.
        """
        return self._native.alloc(tokens)

    def claim(self, slot: int) -> None:
        """Takes one particular idle slot. Raises ValueError if it is in use."""
        self._native.claim(slot)

    def free(self, slot: int) -> None:
        """Gives a slot back. The caller guarantees that no kernel in flight touches it.

        Its pages stay mapped for the next owner (deferred reclamation) or are unmapped now.
        """
        self._native.free(slot)

    def prepare(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Pages for the first tokens[i] tokens of slots[i] exist on return, of every i or, if it raises, of none more.

        A length never shrinks: a target below the slot's prepared length asks for nothing.
        Raises OutOfMemoryError, DeviceError, and ValueError for a slot not allocated or a length past max_tokens.
        """
        self._native.prepare(slots, tokens)

    def prefetch(self, slots: Sequence[int], tokens: Sequence[int], lead_tokens: int = 0) -> None:
        """The same targets, best effort, mapped on the worker thread; returns at once, unless the worker
        is still busy with an earlier request.

        lead_tokens: of the slots that have what they ask for, the one nearest to the end of its page gets the next page
        too, if it would ask for it within so many tokens. Slots that reach an end of a page together are then served
        one a step: as many tokens as there are slots are enough for that.
        Takes rows back from idle slots only. What goes wrong is counted in `stats`. Lengths past max_tokens are cut.
        """
        self._native.prefetch(slots, tokens, lead_tokens)

    def wait(self) -> None:
        """Returns once the worker has nothing left to do."""
        self._native.wait()

    def share(self, source: int, target: int, tokens: int) -> int:
        """Maps the pages that hold the first `tokens` tokens of `source` at `target` too; returns the number shared.

        The number is `tokens` rounded down to where a page and a token end together, so it may be 0. `target` must be
        allocated and have nothing prepared; from here on its prepared length is that number. `target` must write only
        behind it: what lies before is one memory for both. Freeing either slot leaves the other whole.

        Pages are mapped in extents of 1, 4, 16 or 64 rows. One that straddles the end of the share is cut on the CPU;
        on CUDA its shared rows are copied, which needs as much free memory and waits for the device: the tokens must
        have been written by work that was submitted before. Raises OutOfMemoryError if that memory is missing.
        """
        return self._native.share(source, target, tokens)

    def trim(self, slot: int, tokens: int) -> int:
        """Shortens a slot's prepared length, for tokens that were rejected; returns the length from here on.

        The pages behind it become idle: no kernel in flight may touch them. On CUDA the length may stay up to 63 rows
        longer, to the end of an extent. A longer length than the present one changes nothing. Raises ValueError for a
        length within a page that another slot shares, where tokens behind it would be written.
        """
        return self._native.trim(slot, tokens)

    def map_ahead(self, tokens: int) -> None:
        """Keeps one idle slot mapped for `tokens` tokens from now on, so that the next prompt need not wait; 0: stop.

        Uses memory that is free beyond the reclaim threshold, and gives it back the moment it is needed.
        """
        self._native.map_ahead(tokens)

    def set_deferred_reclamation(self, deferred: bool) -> None:
        """Whether slots freed from now on keep their pages."""
        self._native.set_deferred_reclamation(flag("deferred", deferred))

    def reclaim_idle(self) -> None:
        """Unmaps every idle slot now; the pages stay in the pool, ready for whoever grows."""
        self._native.reclaim_idle()

    def resize(self, budget_bytes: int) -> None:
        """Changes the budget. Shrinking releases idle memory; raises OutOfMemoryError if active slots need more."""
        self._native.resize(byte_count("budget_bytes", budget_bytes))

    def fill_pool(self, bytes: int) -> None:
        """Creates physical pages ahead of need until `bytes` are ready or the budget is spent.

        Without it pages are created when first mapped. Creating maps nothing: it moves the driver's allocation, and a
        shortage of memory, from the first steps to here.
        """
        self._native.fill_pool(byte_count("bytes", bytes))

    def slot_state(self, slot: int) -> tuple[bool, int, int]:
        """Whether the slot is allocated, its prepared tokens, and its mapped rows."""
        return self._native.slot_state(slot)

    def stats(self) -> CacheStats:
        """What the cache holds and has done. May be called on a closed cache."""
        return CacheStats(**self._native.stats())

    def check_integrity(self) -> None:
        """Counts everything anew; raises IntegrityError naming the first disagreement."""
        self._native.check_integrity()

    def close(self) -> None:
        """Releases all physical memory. Tensors keep their addresses but nothing is behind them. Idempotent."""
        self._is_closed = True
        self._tensors = ()
        self._native.close()

    def __enter__(self) -> VirtualKVCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _view(self, region: int, shape: Sequence[int], offset: int = 0) -> torch.Tensor:
        from vattention.tensors import region_tensor, token_view

        tensors = self._tensors
        if self._is_closed:
            raise ValueError("the cache is closed")
        if not tensors:
            tensors = tuple(region_tensor(each, self.dtype) for each in self.regions())
            self._tensors = tensors
        return token_view(tensors[region], self.slot_bytes, self.token_bytes, self.max_tokens, shape, offset)


def report_faults() -> None:
    """From now on a SIGSEGV inside of a cache on the CPU first prints its region, slot and token to standard error.

    Region r is K of layer r, or V of layer r - num_layers; of a megacache 0 is K and 1 is V. The fault then goes on to
    the handler that was installed before, such as faulthandler's. The handler stays for the life of the process.
    """
    _native.report_faults()
