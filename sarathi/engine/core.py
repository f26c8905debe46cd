"""Engine core: scheduler, executor and the steps in flight. Token ids in, one message a step out; no text."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from sarathi.core.scheduler import Scheduler
from sarathi.engine.cache_budget.budget import CacheBudget
from sarathi.executor.base import Executor
from sarathi.messages import (
    CoreOutput,
    CoreStats,
    EngineFacts,
    MemoryStats,
    NewRequest,
    PrefixCacheStats,
    RequestUpdate,
    SchedulerOutput,
    StepFuture,
    StepReport,
    StepResult,
)
from sarathi.request import Request


class InFlightStep(NamedTuple):
    """A launched step whose result has not been taken, and when its scheduling began and ended (clock seconds)."""

    out: SchedulerOutput
    future: StepFuture
    started_at_s: float
    scheduled_at_s: float


class EngineCore:
    """The core in this process, which is also its own client: see `CoreClient` for what the methods promise.

    Messages only cross this boundary: the caller shares no object with the scheduler or the executor.

    is_starved: whether the last step computed nothing, and the next will not either without more memory or a command.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, clock: Callable[[], float] = time.monotonic,
        budget: CacheBudget | None = None,
    ) -> None:  # fmt: skip
        """budget: None: the executor's capacity, for this core alone."""
        self.scheduler = scheduler
        self.executor = executor
        self.facts = EngineFacts(
            executor.vocab_size, executor.max_model_len, executor.capacity, executor.token_bytes, executor.resolution
        )
        self._clock = clock
        self._steps: deque[InFlightStep] = deque()
        self._untold: list[RequestUpdate] = []  # of requests that ended between steps
        self._budget = budget or CacheBudget(scheduler, executor)
        self.is_asleep = self.is_starved = False

    @property
    def has_work(self) -> bool:
        if self.is_asleep:
            return bool(self._untold)
        return self.scheduler.has_work or bool(self._steps or self._untold) or not self._budget.is_settled

    @property
    def look_s(self) -> float | None:
        """Seconds between two calls of `balance`, also while there is no work; None: it does nothing."""
        return self._budget.look_s

    @property
    def idle_look_s(self) -> float | None:
        """Seconds between two calls of `balance` and `check_life` while there is no work; None: they do nothing."""
        return min(filter(None, (self._budget.look_s, self.executor.look_s)), default=None)

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        if not self.executor.takes_functions and any(new.sampling_params.logits_processors for new in requests):
            raise ValueError(
                "logits_processors must be empty with tensor_parallel_size > 1 or an executor of other processes: they "
                "are functions of this process"
            )
        for new in requests:
            request = Request(new.request_id, new.token_ids, new.sampling_params, new.eos_token_ids, new.priority)
            self.scheduler.add(request)

    def finish(self, request_id: str, reason: str, stop_reason: str | None = None) -> None:
        self.scheduler.finish(request_id, reason, stop_reason)

    def step(self) -> CoreOutput:
        """Launch one step, and wait for the oldest where no more may be in flight. Asleep: no step.

        A step without requests still tells the executor of memory that is to be released.
        """
        if not self.is_asleep and (self.scheduler.has_work or not self._budget.is_settled):
            started_at_s = self._clock()
            out = self._complete(self.scheduler.schedule())
            scheduled_at_s = self._clock()
            self._steps.append(InFlightStep(out, self._launch(out), started_at_s, scheduled_at_s))
        untold, self._untold, self.is_starved = self._untold, [], False
        has_room = len(self._steps) < self.executor.max_in_flight
        if not self._steps or (has_room and self._steps[-1].out.chunks and self.scheduler.has_work):
            return CoreOutput(tuple(untold))  # the next call launches another step behind the newest one
        step = self._steps[0]
        result = step.future.result()
        self._steps.popleft()
        executed_at_s = self._clock()
        updates = (*untold, *self._updates(step.out, result))
        self._budget.settle()
        self.is_starved = not (step.out.chunks or self._steps or updates)
        report = StepReport(step.out, result, step.started_at_s, step.scheduled_at_s, executed_at_s)
        first_scheduled = tuple([new.request_id for new in step.out.new_requests])
        return CoreOutput(updates, report, first_scheduled, step.started_at_s)

    def reset(self) -> None:
        """The memory of a request must not be released under a running step, so all steps are waited for first."""
        try:
            self._wait_for_steps()
        finally:
            self._steps.clear()
            self._untold.clear()
            self.scheduler.reset()

    def resize(self, rows: int) -> None:
        """Let requests hold this many rows from now on. The next step tells of those that this ended."""
        self._untold += self.scheduler.resize(rows)

    def set_cache_budget(self, memory_bytes: int) -> None:
        """Shrink or grow the cache with its physical memory, which is given back as soon as no request has it. The next
        step tells of requests that are too long for it. ValueError: see `CacheBudget.set_bytes`."""
        self._untold += self._budget.set_bytes(memory_bytes)

    def balance(self) -> None:
        """Between two steps: take memory that other servers of the group leave, or leave them some."""
        self._untold += self._budget.balance()

    def check_life(self) -> None:
        """Without work: raise RankError where a rank has died or hangs."""
        self.executor.check_life()

    def sleep(self, level: int = 1) -> None:
        self._check_level(level)
        if not self.is_asleep:
            self._preempt_all()
            self._budget.release()
            self.is_asleep = True
        if level == 2:
            self.executor.drop_weights()

    def wake_up(self) -> None:
        """Preempted requests are computed again, and none is lost."""
        if self.is_asleep:
            self.executor.load_weights()
            self._budget.restore()
            self.is_asleep = False

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()

    def prefix_cache_stats(self) -> PrefixCacheStats:
        return self.scheduler.prefix_cache_stats

    def memory_stats(self) -> MemoryStats:
        """Retained memory counts as idle. The executor, which may not have been told yet, counts it as in use."""
        stats, capacity = self.executor.memory_stats(), self.facts.capacity
        row_bytes = self.facts.token_bytes * capacity.page_bytes // capacity.token_bytes
        retained_bytes = self.scheduler.prefix_cache_stats.num_retained_rows * row_bytes
        unused_bytes = stats.mapped_bytes - self.scheduler.block_space_manager.num_used_rows * row_bytes
        idle_bytes = max(stats.idle_bytes, min(stats.idle_bytes + retained_bytes, unused_bytes))
        return replace(stats, idle_bytes=idle_bytes)

    def stats(self) -> CoreStats:
        """Queues and memory between two steps."""
        scheduler = self.scheduler
        rows = scheduler.block_space_manager
        return CoreStats(
            scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions, rows.num_used_rows,
            rows.capacity.rows, self.memory_stats(), self.prefix_cache_stats(),
        )  # fmt: skip

    def shutdown(self) -> None:
        try:
            self.reset()
        finally:
            self.executor.shutdown()

    def _check_level(self, level: int) -> None:
        if level not in (1, 2):
            raise ValueError(f"level is {level!r}: it must be 1, the cache, or 2, the weights too")
        found = self.executor.resolution
        if level == 2 and found.device != "cpu" and not found.mapped_weights:
            raise ValueError(
                f"level is 2: weights on {found.device} stay, since CUDA graphs contain their addresses, unless the "
                "engine is started with mapped_weights=True; use 1"
            )

    def _preempt_all(self) -> None:
        """Wait for the steps in flight, and have the executor release the memory of every request."""
        self._take_results()
        out = self.scheduler.preempt_all()
        self._untold += self._updates(out, self.executor.launch(out).result())

    def _take_results(self) -> None:
        """Of all steps in flight."""
        while self._steps:
            step = self._steps.popleft()
            self._untold += self._updates(step.out, step.future.result())

    def _complete(self, out: SchedulerOutput) -> SchedulerOutput:
        """A scheduled step, with what others than the scheduler add to it."""
        return out

    def _launch(self, out: SchedulerOutput) -> StepFuture:
        return self.executor.launch(out)

    def _updates(self, out: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        prompts = [RequestUpdate(each.request_id, prompt_logprobs=each) for each in result.prompt_logprobs]
        return prompts + self.scheduler.update(out, result)

    def _wait_for_steps(self) -> None:
        """Wait for the steps in flight, then for everything the executor runs, whatever ends the first wait.

        Ctrl-C may have come between a launch and its entry among the steps, or may come again during the wait.
        """
        try:
            for step in self._steps:
                with suppress(Exception):
                    step.future.result()
        finally:
            with suppress(Exception):
                self.executor.wait()
