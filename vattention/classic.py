"""The functions of the original vAttention release over one VirtualKVCache.

The original's terms: a request id is a slot, a KV block is a row. The sequence lengths that `step` takes are one number
for each slot, 0 where there is no request.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from vattention.arguments import byte_count, flag, in_range, positive
from vattention.errors import NoFreeSlotError, VAttentionError
from vattention.kv_cache import VirtualKVCache

if TYPE_CHECKING:
    import torch

_UNBOUNDED_BYTES = 1 << 62
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class ClassicCache:
    """A cache, and the sequence lengths of the last call."""

    cache: VirtualKVCache
    lengths: list[int]
    allocated: set[int] = field(default_factory=set)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Allocates slots whose length is new, and frees those whose length fell to 0.

        Raises ValueError or TypeError for a wrong number of lengths or a wrong length, and then changes nothing.
        """
        if not hasattr(lengths, "__len__") or len(lengths) != self.cache.num_slots:
            raise ValueError(f"seq_lens must be a list of one length a slot, {self.cache.num_slots}, got {lengths!r}")
        lengths = [self.length(f"seq_lens[{slot}]", length, least=0) for slot, length in enumerate(lengths)]
        for slot, (before, now) in enumerate(zip(self.lengths, lengths, strict=True)):
            if before > 0 and now == 0:
                self.release(slot)
            elif now > 0 and slot not in self.allocated:
                self.cache.claim(slot)
                self.allocated.add(slot)
            self.lengths[slot] = now

    def active(self) -> tuple[list[int], list[int]]:
        slots = [slot for slot, length in enumerate(self.lengths) if length > 0]
        return slots, [self.lengths[slot] for slot in slots]

    def release(self, slot: int) -> None:
        self.lengths[slot] = 0
        if slot in self.allocated:
            self.allocated.remove(slot)
            self.cache.free(slot)

    def alloc(self, length: int) -> int:
        length = self.length("seq_len", length, least=1)  # length 0 means a free slot
        try:
            slot = self.cache.alloc(length)
        except NoFreeSlotError:
            # Slots that only hold common pages are allocated in the cache, but free for callers of these functions.
            slot = next((slot for slot in sorted(self.allocated) if self.lengths[slot] == 0), -1)
        if slot >= 0:
            self.allocated.add(slot)
            self.lengths[slot] = length
        return slot

    def length(self, name: str, value: object, least: int) -> int:
        """The value, if it is a number of tokens; else raises ValueError or TypeError."""
        return in_range(name, value, least, self.cache.max_tokens)


def as_function(method: Callable[P, R]) -> Callable[P, R]:
    """A bound method as a plain function, for help() and inspect."""

    @functools.wraps(method)
    def function(*args: P.args, **options: P.kwargs) -> R:
        return method(*args, **options)

    function.__module__, function.__qualname__ = "vattention", function.__name__
    return function


class ClassicAPI:
    """The functions, as methods over one cache at a time; the package exports those of one instance."""

    def __init__(self, log: Callable[[str], None] = print) -> None:
        self._state: ClassicCache | None = None
        self._verbose = False
        self._log = log

    def init_kvcache(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        max_batch_size: int,
        max_context_length: int,
        device: int | str | torch.device,
        dtype: torch.dtype | str,
        page_size: int | None,
        megacache: bool = False,
    ) -> list[torch.Tensor]:
        """Reserves address space and returns its tensors, K of every layer and then V; maps nothing.

        Per layer: 2 * num_layers of [max_batch_size, max_context_length, num_kv_heads, head_size]. Megacache: K and V
        as [max_batch_size, max_context_length, num_layers, num_kv_heads, head_size]. `page_size` in bytes; None or 0
        for the device's own. Until reserve_physical_pages() the budget is one row a slot.
        """
        num_slots = positive("max_batch_size", max_batch_size)
        max_tokens = positive("max_context_length", max_context_length)
        page_bytes = byte_count("page_size", 0 if page_size is None else page_size)
        self.cleanup()
        cache = VirtualKVCache(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            num_slots=num_slots,
            max_tokens=max_tokens,
            dtype=dtype,
            device=device,
            budget_bytes=_UNBOUNDED_BYTES,  # the real budget is in rows, whose bytes depend on the device's page size
            page_bytes=page_bytes or None,
            megacache=megacache,
        )
        cache.resize(num_slots * cache.row_bytes)
        self._state = ClassicCache(cache, [0] * num_slots)
        return cache.tensors()

    def reserve_physical_pages(self, free_memory: int) -> int:
        """Sets the budget to `free_memory` bytes and creates its pages; returns the number of pages."""
        cache, free_memory = self._open.cache, byte_count("free_memory", free_memory)
        cache.resize(free_memory)
        cache.fill_pool(free_memory)
        return cache.capacity_rows * cache.num_regions

    def alloc_new_batch_idx(self, seq_len: int) -> int:
        """A free slot, best fit for `seq_len` tokens, or -1 if there is none. Maps nothing: step() does.

        Raises ValueError for a length of 0, which means a free slot, or beyond max_context_length.
        """
        slot = self._open.alloc(seq_len)
        self._say(f"slot {slot} for {seq_len} tokens")
        return slot

    def free_batch_idx(self, idx: int) -> None:
        """Frees a slot; its pages stay mapped while reclamation is deferred."""
        state = self._open
        state.release(in_range("idx", idx, 0, state.cache.num_slots - 1))

    def step(self, seq_lens: Sequence[int], eager_reclaim: bool) -> None:
        """Maps the pages of these lengths; with eager_reclaim, unmaps those of slots of length 0.

        A length that shrinks without passing through 0 keeps its pages.
        """
        state = self._open
        is_eager = flag("eager_reclaim", eager_reclaim)
        state.set_lengths(seq_lens)
        if is_eager:
            for slot in [slot for slot in state.allocated if state.lengths[slot] == 0]:
                state.release(slot)
            state.cache.reclaim_idle()
        state.cache.prepare(*state.active())

    def step_async(self, seq_lens: Sequence[int]) -> None:
        """Maps the pages of these lengths, and in the background those of one more token each."""
        state = self._open
        state.set_lengths(seq_lens)
        slots, lengths = state.active()
        state.cache.prepare(slots, lengths)
        state.cache.prefetch(slots, [length + 1 for length in lengths])

    def num_free_kvblocks(self) -> int:
        """Rows that new tokens could use: free and idle ones."""
        stats = self._open.cache.stats()
        return (stats.capacity_bytes - stats.mapped_bytes + stats.idle_bytes) // self._open.cache.row_bytes

    def set_deferred_reclamation(self, value: bool) -> None:
        """Whether slots freed from now on keep their pages."""
        self._open.cache.set_deferred_reclamation(flag("value", value))

    def map_common_pages(self, num_tokens: int) -> None:
        """Maps the same pages at the start of every slot: all slots read what one writes there, until it is freed."""
        state = self._open
        cache = state.cache
        num_tokens = state.length("num_tokens", num_tokens, least=0)
        if any(state.lengths):
            raise VAttentionError("map_common_pages needs every slot to be free")
        tokens = min(cache.rows_for(num_tokens) * cache.page_bytes // cache.token_bytes, cache.max_tokens)
        tokens -= tokens % (cache.page_bytes // math.gcd(cache.page_bytes, cache.token_bytes))  # as share() rounds
        for slot in range(cache.num_slots):
            if slot not in state.allocated:
                cache.claim(slot)
                state.allocated.add(slot)
        cache.prepare([0], [tokens])
        for slot in range(1, cache.num_slots):
            cache.share(0, slot, tokens)

    def show_kvcache_config(self) -> None:
        """Prints sizes and layout."""
        cache = self._open.cache
        for name in ("num_layers", "num_kv_heads", "head_size", "num_slots", "max_tokens", "dtype", "megacache"):
            self._log(f"{name}: {getattr(cache, name)}")
        self._log(f"page_bytes: {cache.page_bytes}  token_bytes: {cache.token_bytes}  regions: {cache.num_regions}")

    def show_allocator_state(self) -> None:
        """Prints free rows, and length, mapped and needed rows of every slot."""
        state = self._open
        self._log(f"free rows: {self.num_free_kvblocks()} of {state.cache.capacity_rows}")
        self._log("slot : length : mapped : needed")
        for slot, length in enumerate(state.lengths):
            mapped = state.cache.slot_state(slot)[2]
            self._log(f"{slot:4} : {length:6} : {mapped:6} : {state.cache.rows_for(length):6}")

    def set_verbose(self, value: bool) -> None:
        """Whether alloc_new_batch_idx() prints the slots that it returns."""
        self._verbose = flag("value", value)

    def cleanup(self) -> None:
        """Releases everything; the tensors of init_kvcache() must not be touched afterwards."""
        if self._state is not None:
            self._state.cache.close()
            self._state = None

    @property
    def _open(self) -> ClassicCache:
        if self._state is None:
            raise VAttentionError("init_kvcache() comes first")
        return self._state

    def _say(self, text: str) -> None:
        if self._verbose:
            self._log(text)
