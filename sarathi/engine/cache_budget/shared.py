"""The budget of a KV cache that shares a total with other servers on the same device."""

import time
from collections.abc import Callable, Sequence

from sarathi.core.scheduler import Scheduler
from sarathi.engine.cache_budget.budget import CacheBudget
from sarathi.engine.cache_budget.division import Claim
from sarathi.engine.cache_budget.group import BudgetGroup
from sarathi.executor.base import Executor
from sarathi.messages import RequestUpdate

_RESERVE = 32  # an idle member still wishes for 1/32 of the total, so that a first request need not wait


class SharedCacheBudget(CacheBudget):
    """Holds as much of the total as the group allows. Idle members leave memory to those that need it."""

    poll_interval_s = 0.1

    def __init__(
        self, scheduler: Scheduler, executor: Executor, group: BudgetGroup, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """executor: its capacity is the group's total."""
        super().__init__(scheduler, executor)
        self._check_virtual()
        self._group, self._clock = group, clock
        self._is_released = False
        self._oldest: tuple[str | None, float] = None, 0.0  # request id, and the time at which it became the oldest
        self._next_poll_s = 0.0
        self._set_rows(0)  # nothing has been granted yet
        self.balance()

    def set_bytes(self, memory_bytes: int) -> Sequence[RequestUpdate]:
        raise ValueError("the budget of this server cannot be set: its kv_budget_group determines it")

    def balance(self) -> Sequence[RequestUpdate]:
        now_s = self._clock()
        if now_s < self._next_poll_s:
            return ()
        self._next_poll_s = now_s + self.poll_interval_s
        allowed = self._group.exchange(self._claim(now_s), self._held_rows * self._row_bytes)
        rows = min(allowed // self._row_bytes, self._reachable_rows)
        return () if rows == self._rows or self._is_released else self._set_rows(rows)

    def release(self) -> None:
        self._set_rows(0)
        self._is_released = True
        self._next_poll_s = 0.0

    def restore(self) -> None:
        """The next `balance` allocates what the group allows."""
        self._is_released = False
        self._next_poll_s = 0.0

    def _claim(self, now_s: float) -> Claim:
        if self._is_released:
            return Claim()
        scheduler, total = self._scheduler, self._reachable_rows
        oldest_id, need = scheduler.oldest_need()
        if oldest_id != self._oldest[0]:
            self._oldest = oldest_id, now_s
        wish = max(scheduler.wanted_rows(total), need) + total // _RESERVE + 1
        return Claim(min(wish, total) * self._row_bytes, min(need, total) * self._row_bytes, self._oldest[1])
