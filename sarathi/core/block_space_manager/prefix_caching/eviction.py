"""Which retained sequence is given up first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from sarathi.core.block_space_manager.prefix_caching.index import IndexedSequence

EvictionPolicy = Callable[[IndexedSequence], tuple[int, ...]]
"""The sequence with the smallest key is evicted first. Using a sequence may only make its key larger."""


def lru(sequence: IndexedSequence) -> tuple[int, ...]:
    """Least recently used first."""
    return (sequence.last_used,)


def lfu(sequence: IndexedSequence) -> tuple[int, ...]:
    """Least frequently used first; the least recent of equals."""
    return sequence.num_uses, sequence.last_used


POLICIES: dict[str, EvictionPolicy] = {"lru": lru, "lfu": lfu}

Entry = TypeVar("Entry", bound=Hashable)


class EvictionQueue(Generic[Entry]):
    """Retained sequences in the policy's order, O(log n) each: keys that have grown meanwhile are found when they come
    first.

    key_of: the policy's key of an entry; None where it is not retained any more.
    """

    def __init__(self, key_of: Callable[[Entry], tuple[int, ...] | None]) -> None:
        self._key_of = key_of
        self._heap: list[tuple[tuple[int, ...], int, Entry]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Entries, those that are not retained any more included."""
        return len(self._heap)

    def push(self, entry: Entry) -> None:
        """Add an entry that is retained."""
        key = self._key_of(entry)
        if key is not None:
            heapq.heappush(self._heap, (key, next(self._numbers), entry))

    def first(self) -> Entry | None:
        """The entry to give up first; it stays in the queue."""
        while self._heap:
            key, _, entry = self._heap[0]
            now = self._key_of(entry)
            if now is None:
                heapq.heappop(self._heap)
            elif now != key:
                heapq.heapreplace(self._heap, (now, next(self._numbers), entry))
            else:
                return entry
        return None

    def pop(self) -> None:
        """Remove the entry that first() returned."""
        heapq.heappop(self._heap)

    def compact(self, num_retained: int) -> None:
        """Remove what is not retained any more, where it is most of the queue: amortized O(1) for each push."""
        if len(self._heap) > 4 * num_retained + 64:
            entries = dict.fromkeys(entry for _, _, entry in self._heap)
            self._heap.clear()
            for entry in entries:
                self.push(entry)
