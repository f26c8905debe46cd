"""The KV cache: checks arguments, and makes layouts and tensors over the native allocator."""

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

    Layouts. Per layer: 2 * num_layers regions; a token is num_kv_heads * head_size elements in each. Megacache: one
    region for K and one for V; a token holds all layers, so a page holds fewer tokens and less of it is wasted.
    A row, one page at the same offset of every region, is the unit of account.

    Promise: any lengths of the allocated slots with sum(rows_for(length)) <= capacity_rows can be prepared. Rows of
    idle slots are reclaimed first, then rows mapped ahead. `prefetch` and `map_ahead` never break the promise.

    Threads may share a cache. A forked process cannot use its parent's: every call but `close` raises ForkError there,
    and reading its tensors is SIGSEGV.

    Args:
        num_layers, num_kv_heads, head_size: the model's.
        num_slots: sequences that can be in the cache at once.
        max_tokens: longest length of a slot. Slots and tokens cost address space, not memory.
        dtype: a torch dtype, its name ("bfloat16"), or any object with an `itemsize` of at least one byte.
        device: "cpu", "cuda", "cuda:1", a CUDA index, or a torch.device.
        budget_bytes: physical memory for K and V together, rounded down to whole rows.
        page_bytes: a multiple of the device's granularity, at least one token. Default: 64 KiB on the CPU, the driver's
            granularity on CUDA (2 MiB on present GPUs).
        megacache: selects the layout, see above.
        deferred_reclamation: a freed slot keeps its pages until they are needed (Section 6 of the vAttention paper).
        reclaim_threshold: share of the budget that the worker keeps free: after each prefetch it reclaims a few rows of
            idle slots.
        max_extent_rows: the most rows of an extent: 1, 4, 16 or 64. If less than 64, no extent straddles a multiple of
            it within its slot, so that shares and trims end there exactly on CUDA too.

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
        except DeviceError as error:  # the constructor only reserves addresses
            raise DeviceError(
                f"{num_slots} slots of {max_tokens} tokens take more addresses than the device has: {error}"
            ) from error
        self._tensors: tuple[torch.Tensor, ...] = ()  # of the regions, from their first use to close()
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

        Raises ValueError for negative numbers and for more than max_tokens.
        """
        return self._native.rows_for(in_range("tokens", tokens, 0, self.max_tokens))

    def view(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer in one slot, each [prepared tokens, num_kv_heads, head_size]: all of it may be touched.

        They are views: writes reach the cache. They keep their length when the slot grows, and must not be touched
        after the slot is freed. Raises ValueError for a slot that is not allocated.
        """
        is_allocated, tokens, _ = self._native.slot_state(slot)
        if not is_allocated:
            raise ValueError(f"slot {slot} is not allocated")
        k, v = self.layer(in_range("layer", layer, 0, self.num_layers - 1))
        return k[slot, :tokens], v[slot, :tokens]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer for kernels, each [num_slots, max_tokens, num_kv_heads, head_size], strided.

        Only prepared tokens may be read, printed or written: elsewhere the CPU gets SIGSEGV (see `report_faults`) and
        CUDA error 700; `view` has these tokens alone. New pages have undefined contents, so kernels must not use tokens
        past a sequence's length.
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
        """Bytes from one slot of a region to the next, a multiple of page_bytes."""
        return self._native.slot_bytes

    def alloc(self, tokens: int = 0) -> int:
        """The idle slot whose mapped rows suit `tokens` tokens best. Maps nothing and calls no driver.

        Rows that cannot serve this length stay mapped until their addresses or their memory are needed.
        Raises NoFreeSlotError.
        """
        return self._native.alloc(tokens)

    def claim(self, slot: int) -> None:
        """Allocates this slot. Raises ValueError if it is in use."""
        self._native.claim(slot)

    def free(self, slot: int) -> None:
        """Frees a slot. The caller guarantees that no kernel in flight touches it.

        Its pages stay mapped for the next owner (deferred reclamation) or are unmapped now.
        """
        self._native.free(slot)

    def prepare(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Maps pages for the first tokens[i] tokens of slots[i], for every i or, if it raises, for none.

        Lengths never shrink: a target below the slot's prepared length has no effect.
        Raises OutOfMemoryError, DeviceError, and ValueError for a slot not allocated or a length past max_tokens.
        """
        self._native.prepare(slots, tokens)

    def prefetch(self, slots: Sequence[int], tokens: Sequence[int], lead_tokens: int = 0) -> None:
        """Maps the same targets on the worker thread, best effort. Returns at once, unless the worker is still busy.

        lead_tokens: of the slots with nothing to map, the one nearest to the end of its last page gets its next page
        too, if it needs it within this many tokens. So slots that need a page in the same step get theirs in different
        steps; the number of slots is a sufficient value.
        Reclaims rows of idle slots only. `stats` counts failures. Lengths past max_tokens mean max_tokens.
        """
        self._native.prefetch(slots, tokens, lead_tokens)

    def wait(self) -> None:
        """Waits until the worker has nothing left to do."""
        self._native.wait()

    def share(self, source: int, target: int, tokens: int) -> int:
        """Maps the pages that hold the first `tokens` tokens of `source` at `target` too; returns the number shared.

        The number is `tokens` rounded down to where a page and a token end together, so it may be 0. `target` must be
        allocated and have no prepared tokens; the number becomes its prepared length. `target` must write only behind
        it: what lies before is the same memory in both slots. Either slot can be freed; the other keeps the pages.

        An extent (1, 4, 16 or 64 rows) that straddles the end of the share is cut on the CPU. On CUDA its shared rows
        are copied, which takes as many rows of the budget and waits for the device: the work that writes these tokens
        must have been submitted before. Raises OutOfMemoryError if these rows are missing.
        """
        return self._native.share(source, target, tokens)

    def trim(self, slot: int, tokens: int) -> int:
        """Shortens a slot's prepared length, for example after rejected tokens; returns the new length.

        The pages behind it become idle: no kernel in flight may touch them. On CUDA the length may stay up to 63 rows
        longer, to the end of an extent. A longer length than the present one has no effect. Raises ValueError for a
        length inside of a page that another slot shares: the next token would overwrite that slot's.
        """
        return self._native.trim(slot, tokens)

    def map_ahead(self, tokens: int) -> None:
        """Keeps one idle slot mapped for `tokens` tokens, so that the next prompt need not wait; 0 ends this.

        Uses only memory that is free beyond the reclaim threshold; it is reclaimed as soon as it is needed.
        """
        self._native.map_ahead(tokens)

    def set_deferred_reclamation(self, deferred: bool) -> None:
        """Whether slots freed from now on keep their pages."""
        self._native.set_deferred_reclamation(flag("deferred", deferred))

    def reclaim_idle(self) -> None:
        """Unmaps every idle slot; the pages stay in the pool."""
        self._native.reclaim_idle()

    def resize(self, budget_bytes: int) -> None:
        """Changes the budget; shrinking releases idle memory. Raises OutOfMemoryError if active slots need more."""
        self._native.resize(byte_count("budget_bytes", budget_bytes))

    def fill_pool(self, bytes: int) -> None:
        """Creates physical pages in advance until `bytes` are ready or the budget is used up. Maps nothing.

        Without this call pages are created when they are first mapped: the driver's allocations, and any shortage of
        memory, then come in the first steps.
        """
        self._native.fill_pool(byte_count("bytes", bytes))

    def slot_state(self, slot: int) -> tuple[bool, int, int]:
        """Whether the slot is allocated, its prepared tokens, and its mapped rows."""
        return self._native.slot_state(slot)

    def stats(self) -> CacheStats:
        """Memory and counters of the cache. May be called on a closed cache."""
        return CacheStats(**self._native.stats())

    def check_integrity(self) -> None:
        """Recounts everything; raises IntegrityError naming the first inconsistency."""
        self._native.check_integrity()

    def close(self) -> None:
        """Releases all physical memory; tensors must not be touched any more. Idempotent."""
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
    """Installs a SIGSEGV handler that prints region, slot and token of a fault inside of a CPU cache to standard error.

    Region r is K of layer r, or V of layer r - num_layers; in a megacache 0 is K and 1 is V. The previous handler, such
    as faulthandler's, is called next. The handler stays for the life of the process.
    """
    _native.report_faults()
