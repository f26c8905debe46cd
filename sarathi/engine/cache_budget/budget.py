"""The KV cache's budget: rows for the scheduler and physical memory on every rank."""

from collections.abc import Sequence

from sarathi.core.scheduler import Scheduler
from sarathi.executor.base import Executor
from sarathi.messages import RequestUpdate


class CacheBudget:
    """Grows memory before the scheduler uses it, and frees memory once no request uses it.

    poll_interval_s: between two calls of `balance`, with or without work; None: no calls are needed.
    """

    poll_interval_s: float | None = None

    def __init__(self, scheduler: Scheduler, executor: Executor, num_engines: int = 1) -> None:
        """num_engines: number of engines that divide the budget of `set_bytes` equally."""
        self._scheduler, self._executor, self._num_engines = scheduler, executor, num_engines
        self._rows = self._held_rows = self._reachable_rows = executor.capacity.rows

    @property
    def is_settled(self) -> bool:
        """Whether no memory above the budget remains to be freed."""
        return self._held_rows == self._rows

    def set_bytes(self, memory_bytes: int) -> Sequence[RequestUpdate]:
        """Set the budget to the whole rows in memory_bytes (sum over all ranks of all engines). Returns the updates of
        requests that end because they are now too long.

        ValueError if no row fits, or for a paged cache, whose tensors cannot grow in place.
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
        """Adjust the budget to the other members' needs. Returns updates that end requests that are now too long."""
        return ()

    def settle(self) -> None:
        """Free the memory above the budget, as soon as that is possible."""
        if not self.is_settled and self._executor.resize_cache(self._rows):
            self._held_rows = self._rows

    def release(self) -> None:
        """Free all memory. No request may use any."""
        self._executor.resize_cache(0)

    def restore(self) -> None:
        """Allocate the budget's memory again after `release`."""
        self._executor.resize_cache(self._rows)

    @property
    def _row_bytes(self) -> int:
        capacity = self._executor.capacity
        return self._executor.token_bytes * capacity.page_bytes // capacity.token_bytes

    def _check_virtual(self) -> None:
        backend = self._executor.resolution.backend
        if "paged" in backend:
            raise ValueError(f"attention_backend is {backend}: the budget of a paged cache cannot change")

    def _set_rows(self, rows: int) -> Sequence[RequestUpdate]:
        grows, self._rows = rows > self._held_rows, rows
        if grows:
            self.settle()
        updates = self._scheduler.resize(rows, self._reachable_rows)
        self.settle()
        return updates
