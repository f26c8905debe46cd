"""Engine core: scheduler, executor and the steps in flight. Token ids in, one message a step out; no text."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from sarathi.core.scheduler import Scheduler
from sarathi.engine.cache_budget import CacheBudget
from sarathi.executor.base import Executor
from sarathi.messages import (
    CoreOutput,
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
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.facts = EngineFacts(
            executor.vocab_size, executor.max_model_len, executor.capacity, executor.token_bytes, executor.resolution
        )
        self._clock = clock
        self._steps: deque[InFlightStep] = deque()
        self._untold: list[RequestUpdate] = []  # of requests that ended between steps
        self._budget = CacheBudget(scheduler, executor)
        self.is_asleep = False

    @property
    def has_work(self) -> bool:
        if self.is_asleep:
            return bool(self._untold)
        return self.scheduler.has_work or bool(self._steps or self._untold)

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
        """Launch one step, and wait for the oldest where no more may be in flight. Asleep: no step."""
        if self.scheduler.has_work and not self.is_asleep:
            started_at_s = self._clock()
            out = self.scheduler.schedule()
            scheduled_at_s = self._clock()
            self._steps.append(InFlightStep(out, self.executor.launch(out), started_at_s, scheduled_at_s))
        untold, self._untold = self._untold, []
        if not self._steps or self._may_launch_more():
            return CoreOutput(tuple(untold))
        step = self._steps[0]
        result = step.future.result()
        self._steps.popleft()
        executed_at_s = self._clock()
        updates = (*untold, *self._updates(step.out, result))
        self._budget.settle()
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

    def sleep(self) -> None:
        """Preempt every request, and give the cache's memory back. Requests wait until `wake_up`."""
        if self.is_asleep:
            return
        while self._steps:
            step = self._steps.popleft()
            self._untold += self._updates(step.out, step.future.result())
        out = self.scheduler.preempt_all()
        self._untold += self._updates(out, self.executor.launch(out).result())
        self._budget.release()
        self.is_asleep = True

    def wake_up(self) -> None:
        """Take the cache's memory again, and go on. Preempted requests are computed again, and none is lost."""
        if self.is_asleep:
            self._budget.restore()
            self.is_asleep = False

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()

    def prefix_cache_stats(self) -> PrefixCacheStats:
        return self.scheduler.block_space_manager.stats

    def memory_stats(self) -> MemoryStats:
        return self.executor.memory_stats()

    def shutdown(self) -> None:
        try:
            self.reset()
        finally:
            self.executor.shutdown()

    def _updates(self, out: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        prompts = [RequestUpdate(each.request_id, prompt_logprobs=each) for each in result.prompt_logprobs]
        return prompts + self.scheduler.update(out, result)

    def _may_launch_more(self) -> bool:
        """Whether there is room for another step behind the newest one, and something to put into it."""
        is_full = len(self._steps) >= self.executor.max_in_flight
        return not is_full and bool(self._steps[-1].out.chunks) and self.scheduler.has_work

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
