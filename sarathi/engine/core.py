"""Engine core: scheduler, executor and the steps in flight. It takes token ids and returns one message per step."""

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
    """A launched step whose result has not been processed. Scheduling began and ended at these clock seconds."""

    out: SchedulerOutput
    future: StepFuture
    started_at_s: float
    scheduled_at_s: float


class EngineCore:
    """A `CoreClient` of the core in this process. Callers exchange only messages with it.

    is_starved: the last step computed nothing, and the next one cannot without more memory or a command.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, clock: Callable[[], float] = time.monotonic,
        budget: CacheBudget | None = None,
    ) -> None:  # fmt: skip
        """budget: None means that this core alone uses the executor's capacity."""
        self.scheduler = scheduler
        self.executor = executor
        self.facts = EngineFacts(
            executor.vocab_size, executor.max_model_len, executor.capacity, executor.token_bytes, executor.resolution
        )
        self._clock = clock
        self._steps: deque[InFlightStep] = deque()
        self._pending_updates: list[RequestUpdate] = []  # returned by the next step
        self._budget = budget or CacheBudget(scheduler, executor)
        self.is_asleep = self.is_starved = False

    @property
    def has_work(self) -> bool:
        if self.is_asleep:
            return bool(self._pending_updates)
        return self.scheduler.has_work or bool(self._steps or self._pending_updates) or not self._budget.is_settled

    @property
    def poll_interval_s(self) -> float | None:
        """Seconds between two calls of `balance`, with or without work; None: no calls are needed."""
        return self._budget.poll_interval_s

    @property
    def idle_poll_interval_s(self) -> float | None:
        """Seconds between two calls of `balance` and `check_health` without work; None: no calls are needed."""
        return min(filter(None, (self._budget.poll_interval_s, self.executor.health_check_interval_s)), default=None)

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        if not self.executor.takes_functions and any(new.sampling_params.logits_processors for new in requests):
            raise ValueError(
                "logits_processors must be empty with tensor_parallel_size > 1 or an executor that uses other "
                "processes: they are functions of this process"
            )
        for new in requests:
            request = Request(new.request_id, new.token_ids, new.sampling_params, new.eos_token_ids, new.priority)
            self.scheduler.add(request)

    def finish(self, request_id: str, reason: str, stop_reason: str | None = None) -> None:
        self.scheduler.finish(request_id, reason, stop_reason)

    def step(self) -> CoreOutput:
        """Launch one step unless asleep; wait for the oldest step if no more may be in flight.

        A step without requests still tells the executor which memory to release.
        """
        if not self.is_asleep and (self.scheduler.has_work or not self._budget.is_settled):
            started_at_s = self._clock()
            out = self._finalize(self.scheduler.schedule())
            scheduled_at_s = self._clock()
            self._steps.append(InFlightStep(out, self._launch(out), started_at_s, scheduled_at_s))
        pending, self._pending_updates, self.is_starved = self._pending_updates, [], False
        has_room = len(self._steps) < self.executor.max_in_flight
        if not self._steps or (has_room and self._steps[-1].out.chunks and self.scheduler.has_work):
            return CoreOutput(tuple(pending))  # the next call launches another step behind the newest one
        step = self._steps[0]
        result = step.future.result()
        self._steps.popleft()
        executed_at_s = self._clock()
        updates = (*pending, *self._updates(step.out, result))
        self._budget.settle()
        self.is_starved = not (step.out.chunks or self._steps or updates)
        report = StepReport(step.out, result, step.started_at_s, step.scheduled_at_s, executed_at_s)
        first_scheduled = tuple([new.request_id for new in step.out.new_requests])
        return CoreOutput(updates, report, first_scheduled, step.started_at_s)

    def reset(self) -> None:
        """Waits for all steps first: a running step may still use the memory of its requests."""
        try:
            self._wait_for_steps()
        finally:
            self._steps.clear()
            self._pending_updates.clear()
            self.scheduler.reset()

    def resize(self, rows: int) -> None:
        """Limit requests to this many rows. The next step returns the updates of requests that this ends."""
        self._pending_updates += self.scheduler.resize(rows)

    def set_cache_budget(self, memory_bytes: int) -> None:
        """Shrink or grow the cache and its physical memory, which is freed as soon as no request uses it. The next step
        ends requests that are too long for it. ValueError: see `CacheBudget.set_bytes`."""
        self._pending_updates += self._budget.set_bytes(memory_bytes)

    def balance(self) -> None:
        """Exchange memory with the other servers of the budget group. Call it between two steps."""
        self._pending_updates += self._budget.balance()

    def check_health(self) -> None:
        """Raise RankError if a rank has died or hangs. Call it while there is no work."""
        self.executor.check_health()

    def sleep(self, level: int = 1) -> None:
        self._check_level(level)
        if not self.is_asleep:
            self._preempt_all()
            self._budget.release()
            self.is_asleep = True
        if level == 2:
            self.executor.drop_weights()

    def wake_up(self) -> None:
        """The preempted requests are computed again."""
        if self.is_asleep:
            self.executor.load_weights()
            self._budget.restore()
            self.is_asleep = False

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()

    def prefix_cache_stats(self) -> PrefixCacheStats:
        return self.scheduler.prefix_cache_stats

    def memory_stats(self) -> MemoryStats:
        """Count retained memory as idle. The executor counts it as in use, since it may not know yet."""
        stats, capacity = self.executor.memory_stats(), self.facts.capacity
        row_bytes = self.facts.token_bytes * capacity.page_bytes // capacity.token_bytes
        retained_bytes = self.scheduler.prefix_cache_stats.num_retained_rows * row_bytes
        unused_bytes = stats.mapped_bytes - self.scheduler.block_space_manager.num_used_rows * row_bytes
        idle_bytes = max(stats.idle_bytes, min(stats.idle_bytes + retained_bytes, unused_bytes))
        return replace(stats, idle_bytes=idle_bytes)

    def stats(self) -> CoreStats:
        """Queue lengths and memory; valid between two steps."""
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
            raise ValueError(f"level is {level!r}: it must be 1 (release the cache) or 2 (release the weights too)")
        found = self.executor.resolution
        if level == 2 and found.device != "cpu" and not found.mapped_weights:
            raise ValueError(
                f"level is 2: weights on {found.device} cannot be released, since CUDA graphs contain their addresses; "
                "use 1, or start the engine with mapped_weights=True"
            )

    def _preempt_all(self) -> None:
        """Wait for the steps in flight, then have the executor release the memory of every request."""
        self._drain_steps()
        out = self.scheduler.preempt_all()
        self._pending_updates += self._updates(out, self.executor.launch(out).result())

    def _drain_steps(self) -> None:
        """Wait for all steps in flight and process their results."""
        while self._steps:
            step = self._steps.popleft()
            self._pending_updates += self._updates(step.out, step.future.result())

    def _finalize(self, out: SchedulerOutput) -> SchedulerOutput:
        """Hook for subclasses: amend a scheduled step before it is launched."""
        return out

    def _launch(self, out: SchedulerOutput) -> StepFuture:
        return self.executor.launch(out)

    def _updates(self, out: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        prompts = [RequestUpdate(each.request_id, prompt_logprobs=each) for each in result.prompt_logprobs]
        return prompts + self.scheduler.update(out, result)

    def _wait_for_steps(self) -> None:
        """Wait for the steps in flight, then for everything the executor runs, even if the first wait is interrupted.

        Ctrl-C may come between a launch and its entry in `_steps`, or again during the wait.
        """
        try:
            for step in self._steps:
                with suppress(Exception):
                    step.future.result()
        finally:
            with suppress(Exception):
                self.executor.wait()
