"""Memory and counters of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """Exact at the moment of the call: the worker is idle while it is taken.

    A handle that several slots share counts once. On the host device physical memory is that created by the allocator;
    the kernel commits a page when it is first touched.
    """

    reserved_bytes: int  # address space; costs no memory
    capacity_bytes: int  # the budget in whole rows
    created_bytes: int  # physical memory: mapped, ready in the pool, or not yet destroyed after a device failure
    mapped_bytes: int  # physical memory mapped at slots
    idle_bytes: int  # of the mapped: behind all prepared lengths of active slots; can be reclaimed at once
    wasted_bytes: int  # of the mapped: in use, but behind the last token of an active slot
    peak_mapped_bytes: int
    prepares: int
    prepares_waited: int  # that mapped pages before returning
    prefetches: int
    prefetches_short: int  # targets without room beside the active slots
    rows_prefetched: int
    rows_reclaimed: int  # of idle slots, and mapped ahead
    worker_failures: int  # failures on the worker thread, which are never raised
    worker_error: str  # the last one; empty if there was none
    pooled_extents: Mapping[int, int]  # rows of the class -> ready extents
    calls: Mapping[str, int]  # reserve, create, destroy, map, unmap -> handles; "map" includes setting access
    seconds: Mapping[str, float]  # time inside those calls

    @property
    def driver_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def driver_s(self) -> float:
        return sum(self.seconds.values())
