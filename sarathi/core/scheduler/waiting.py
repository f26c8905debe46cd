"""The queue of requests that hold no memory, oldest first. Knows no policy."""

from __future__ import annotations

import heapq

from sarathi.core.scheduler.step import Ticket


class WaitingQueue:
    """New and preempted requests by arrival: who was preempted comes back before all who came later."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Ticket]] = []
        self._num_ended = 0

    def push(self, ticket: Ticket) -> None:
        heapq.heappush(self._heap, (ticket.place, ticket))

    def first(self) -> Ticket | None:
        """The oldest request; those that ended while they waited are dropped on the way."""
        while self._heap and self._heap[0][1].request.is_finished:
            heapq.heappop(self._heap)
            self._num_ended -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Take away what first() gave."""
        heapq.heappop(self._heap)

    def note_ended(self) -> None:
        """One of those that wait has ended. More than half of them are dropped at once, at a cost of O(1) for each."""
        self._num_ended += 1
        if 2 * self._num_ended > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].request.is_finished]
            heapq.heapify(self._heap)
            self._num_ended = 0
