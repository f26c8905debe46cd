"""The size of the KV cache while it is used: rows for the scheduler, physical memory on every rank."""

from collections.abc import Sequence

from sarathi.core.scheduler import Scheduler
from sarathi.executor.base import Executor
from sarathi.messages import RequestUpdate


class CacheBudget:
    """Grows memory before the scheduler counts on it, and gives it back once no request has it any more.

    poll_interval_s: seconds after which `balance` is to be called again, with or without work; None: never.
    """

    poll_interval_s: float | None = None

    def __init__(self, scheduler: Scheduler, executor: Executor, num_engines: int = 1) -> None:
        """num_engines: that work together. `set_bytes` is told the sum of their budgets, which are equal."""
        self._scheduler, self._executor, self._num_engines = scheduler, executor, num_engines
        self._rows = self._held_rows = self._reachable_rows = executor.capacity.rows

    @property
    def is_settled(self) -> bool:
        """Whether no memory over the budget waits to be given back."""
        return self._held_rows == self._rows

    def set_bytes(self, memory_bytes: int) -> Sequence[RequestUpdate]:
        """Change the budget to whole rows of memory_bytes, summed over ranks of all engines; the ends of requests that
        are too long.

        ValueError where not one row fits, or where memory is paged, whose tensors cannot grow in place.
        """
        self._check_virtual()
        row_bytes = self._row_bytes * self._num_engines
        if memory_bytes < row_bytes:
            where = " in each engine" if self._num_engines > 1 else ""
            raise ValueError(
                f"memory_bytes is {memory_bytes}: it must be at least {row_bytes}, one row of pages{where}"
            )
        self._reachable_rows = memory_bytes // row_bytes
        return self._set_rows(self._reachable_rows)

    def balance(self) -> Sequence[RequestUpdate]:
        """Change the budget where others need memory, or leave some; the ends of requests that are too long."""
        return ()

    def settle(self) -> None:
        """Give memory back that is over the budget, where that has not been possible so far."""
        if not self.is_settled and self._executor.resize_cache(self._rows):
            self._held_rows = self._rows

    def release(self) -> None:
        """Give all memory back; no request may hold any."""
        self._executor.resize_cache(0)

    def restore(self) -> None:
        """Take the budget's memory again after `release`."""
        self._executor.resize_cache(self._rows)

    @property
    def _row_bytes(self) -> int:
        capacity = self._executor.capacity
        return self._executor.token_bytes * capacity.page_bytes // capacity.token_bytes

    def _check_virtual(self) -> None:
        backend = self._executor.resolution.backend
        if "paged" in backend:
            raise ValueError(f"attention_backend is {backend}: only the budget of virtual memory can change")

    def _set_rows(self, rows: int) -> Sequence[RequestUpdate]:
        grows, self._rows = rows > self._held_rows, rows
        if grows:
            self.settle()
        updates = self._scheduler.resize(rows, self._reachable_rows)
        self.settle()
        return updates
