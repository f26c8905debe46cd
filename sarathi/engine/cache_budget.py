"""The size of the KV cache while it is used: rows for the scheduler, physical memory on every rank."""

from collections.abc import Sequence

from sarathi.core.scheduler import Scheduler
from sarathi.executor.base import Executor
from sarathi.messages import RequestUpdate


class CacheBudget:
    """Grows memory before the scheduler counts on it, and gives it back once no request has it any more."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler, self._executor = scheduler, executor
        self._rows = executor.capacity.rows
        self._is_settled = True

    def set_bytes(self, memory_bytes: int) -> Sequence[RequestUpdate]:
        """Change the budget to whole rows of memory_bytes, summed over ranks; the ends of requests that are too long.

        ValueError where not one row fits, or where memory is paged, whose tensors cannot grow in place.
        """
        capacity = self._executor.capacity
        if "paged" in self._executor.resolution.backend:
            backend = self._executor.resolution.backend
            raise ValueError(f"attention_backend is {backend}: only the budget of virtual memory can change")
        row_bytes = self._executor.token_bytes * capacity.page_bytes // capacity.token_bytes
        if memory_bytes < row_bytes:
            raise ValueError(f"memory_bytes is {memory_bytes}: it must be at least {row_bytes}, one row of pages")
        return self._set_rows(memory_bytes // row_bytes)

    def settle(self) -> None:
        """Give memory back that is over the budget, where that has not been possible so far."""
        if not self._is_settled:
            self._is_settled = self._executor.resize_cache(self._rows)

    def release(self) -> None:
        """Give all memory back; no request may hold any."""
        self._executor.resize_cache(0)

    def restore(self) -> None:
        """Take the budget's memory again after `release`."""
        self._is_settled = self._executor.resize_cache(self._rows)

    def _set_rows(self, rows: int) -> Sequence[RequestUpdate]:
        grows, self._rows = rows > self._rows, rows
        if grows:
            self._executor.resize_cache(rows)
        self._is_settled = grows
        updates = self._scheduler.resize(rows)
        self.settle()
        return updates
