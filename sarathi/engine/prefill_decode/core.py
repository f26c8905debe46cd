"""The engine that decodes, with another one that computes its prompts.

A request gets its memory here first, for its whole prompt. Then the other engine computes it, and its ranks send what a
layer has computed while later layers compute. When its token is known, and all has arrived, it is decoded here. What
the other engine cannot compute, as where its memory runs short, is computed here.
"""

import time
from collections.abc import Callable, Sequence

from sarathi.core.scheduler import Scheduler
from sarathi.engine.cache_budget.budget import CacheBudget
from sarathi.engine.core import EngineCore
from sarathi.engine.prefill_decode.prefill import NUM_ENGINES, Prefilled, Prefills
from sarathi.executor.ranks.executor import RanksExecutor
from sarathi.executor.ranks.group import RankError
from sarathi.messages import (
    Arrival,
    Chunk,
    CompletedStep,
    CoreOutput,
    CoreStats,
    MemoryStats,
    NewRequest,
    PrefixCacheStats,
    RequestUpdate,
    SchedulerOutput,
    StepFuture,
    StepResult,
)

_LOOK_S = 0.005  # for prompts of the other engine, while there is no other work


class PrefillDecodeCore(EngineCore):
    """See EngineCore. Preempted requests are computed again here. Where a rank of either engine fails, both end."""

    executor: RanksExecutor

    def __init__(
        self, scheduler: Scheduler, executor: RanksExecutor, prefills: Prefills,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(scheduler, executor, clock, CacheBudget(scheduler, executor, NUM_ENGINES))
        self._prefills = prefills
        self._new: dict[str, NewRequest] = {}  # whose memory is not mapped yet
        self._computing: set[str] = set()  # by the other engine

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        for new in requests:
            super().add_requests([new])
            self._new[new.request_id] = new

    def finish(self, request_id: str, reason: str, stop_reason: str | None = None) -> None:
        super().finish(request_id, reason, stop_reason)
        self._withdraw(request_id)

    def step(self) -> CoreOutput:
        try:
            self._take_in()
            output = super().step()
            for update in output.updates:
                if update.finish_reason is not None:
                    self._withdraw(update.request_id)
            if output.step is not None and output.step.out.is_empty:
                self._take_in(_LOOK_S)
        except RankError as error:
            self._kill(error)
            raise
        return output

    def check_life(self) -> None:
        try:
            super().check_life()
            self._prefills.check_life()
        except RankError as error:
            self._kill(error)
            raise

    def reset(self) -> None:
        """What the other engine sends is waited for, so that no memory is released under it."""
        try:
            for request_id in self._computing:
                self._prefills.abort(request_id)
            self._wait_for_prefills()
        except RankError as error:
            self._kill(error)
        finally:
            self._new.clear()
            self._computing.clear()
            super().reset()

    def sleep(self, level: int = 1) -> None:
        super().sleep(level)
        self._prefills.call(lambda core: core.sleep(level))

    def wake_up(self) -> None:
        self._prefills.call(lambda core: core.wake_up())
        super().wake_up()

    def set_cache_budget(self, memory_bytes: int) -> None:
        """Each engine gets half of it."""
        self._prefills.call(lambda core: core.set_cache_budget(memory_bytes))
        super().set_cache_budget(memory_bytes)

    def reset_prefix_cache(self) -> bool:
        return super().reset_prefix_cache() and self._prefills.call(lambda core: core.reset_prefix_cache())

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Of both engines: tokens that neither has at hand are looked for twice."""
        both = zip(super().prefix_cache_stats(), self._prefills.stats.prefixes, strict=True)
        return PrefixCacheStats(*[ours + theirs for ours, theirs in both])

    def memory_stats(self) -> MemoryStats:
        """Of both engines: of the other one as it was less than a second ago, or when it had done its work."""
        return MemoryStats.sum_of((super().memory_stats(), self._prefills.stats.memory))

    def stats(self) -> CoreStats:
        """Rows and preemptions of both engines; the other one's requests are some of those here."""
        ours, theirs = super().stats(), self._prefills.stats
        return ours._replace(
            num_preemptions=ours.num_preemptions + theirs.num_preemptions,
            used_rows=ours.used_rows + theirs.used_rows,
            total_rows=ours.total_rows + theirs.total_rows,
        )

    def shutdown(self) -> None:
        try:
            super().shutdown()
        finally:
            self._prefills.shutdown()

    def _launch(self, out: SchedulerOutput) -> StepFuture:
        """Ranks do not hear of a step in which all requests wait for the other engine."""
        return CompletedStep(StepResult(out.step_id)) if out.is_empty else super()._launch(out)

    def _updates(self, out: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        updates = super()._updates(out, result)
        if result.available_rows is None:
            self._start_prefills(out.received)
        return updates

    def _take_results(self) -> None:
        super()._take_results()
        self._wait_for_prefills()

    def _start_prefills(self, received: Sequence[Chunk]) -> None:
        """Their memory is mapped on every rank."""
        for request_id, first in [(chunk.request_id, chunk.start) for chunk in received]:
            if self.scheduler.is_unfinished(request_id):
                self._computing.add(request_id)
                self._prefills.start(self._new.pop(request_id), first)
            else:
                self.scheduler.end_receive(request_id, None)

    def _take_in(self, timeout_s: float = 0.0) -> None:
        """Go on with requests whose prompts are computed."""
        told = self._prefills.take(timeout_s)
        done = [each for each in told if isinstance(each, Prefilled)]
        self._untold += [
            each for each in told if not isinstance(each, Prefilled) and self.scheduler.is_unfinished(each.request_id)
        ]
        if done:
            self.executor.ask("arrive", [self._arrival(each) for each in done])
        for request_id, _, update in done:
            self._computing.discard(request_id)
            self._untold += self.scheduler.end_receive(request_id, update)

    def _arrival(self, done: Prefilled) -> Arrival:
        goes_on = done.update is not None and self.scheduler.is_unfinished(done.request_id)
        token = done.update.tokens[0] if goes_on and done.update is not None and done.update.tokens else None
        return Arrival(done.request_id, done.num_portions, token)

    def _withdraw(self, request_id: str) -> None:
        """A request has ended: nothing more of it is to be computed."""
        self._new.pop(request_id, None)
        if request_id in self._computing:
            self._prefills.abort(request_id)

    def _wait_for_prefills(self) -> None:
        while self._computing and self._prefills.is_running:
            self._take_in(_LOOK_S)

    def _kill(self, error: RankError) -> None:
        """Neither engine can go on without the other."""
        self._computing.clear()
        for executor in (self._prefills.executor, self.executor):
            executor.kill(str(error))
