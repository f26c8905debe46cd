"""What a cache holds and has done, as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """Exact at the moment of the call: the worker is idle while it is taken.

    A handle mapped at several slots (sharing) counts once everywhere. On the host device physical means promised by
    the allocator; the kernel commits a page when it is first touched.
    """

    reserved_bytes: int  # address space; costs no memory
    capacity_bytes: int  # the budget in whole rows
    created_bytes: int  # physical memory held: mapped + ready in the pool + given up by the device only in part
    mapped_bytes: int  # physical memory that stands at a slot
    idle_bytes: int  # of the mapped: not under any active slot's prepared length, can be taken back at once
    wasted_bytes: int  # of the mapped: in use behind the last token of an active slot
    peak_mapped_bytes: int
    prepares: int
    prepares_waited: int  # had to map something before returning
    prefetches: int
    prefetches_short: int  # targets that found no room beside the active slots
    rows_prefetched: int
    rows_reclaimed: int  # taken back from idle slots and from rows mapped ahead
    worker_failures: int  # device failures on the worker, which are counted and never thrown
    worker_error: str  # the last of them; empty if there was none
    pooled_extents: Mapping[int, int]  # rows of the class -> ready extents
    calls: Mapping[str, int]  # reserve, create, destroy, map, unmap -> handles; "map" includes setting access
    seconds: Mapping[str, float]  # time inside those calls

    @property
    def driver_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def driver_s(self) -> float:
        return sum(self.seconds.values())
