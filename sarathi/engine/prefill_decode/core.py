"""The decode engine of prefill/decode disaggregation. It owns the prefill engine, which runs in a thread.

A request first gets memory here for its whole prompt. The prefill engine then computes the prompt, and its ranks send
each layer's keys and values while later layers run. Once the first token and all keys and values have arrived, the
request is decoded here. Prompts that the prefill engine cannot compute, e.g. for lack of memory, are computed here.
"""

import time
from collections.abc import Callable, Sequence

from sarathi.core.scheduler import Scheduler
from sarathi.engine.cache_budget.budget import CacheBudget
from sarathi.engine.core import EngineCore
from sarathi.engine.prefill_decode.prefill import NUM_ENGINES, PrefillResult, PrefillThread
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

_POLL_INTERVAL_S = 0.005  # of the prefill engine's results, while there is no other work


class PrefillDecodeCore(EngineCore):
    """See EngineCore. Preempted requests are recomputed here. If a rank of either engine fails, both engines end."""

    executor: RanksExecutor

    def __init__(
        self, scheduler: Scheduler, executor: RanksExecutor, prefill_thread: PrefillThread,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(scheduler, executor, clock, CacheBudget(scheduler, executor, NUM_ENGINES))
        self._prefill_thread = prefill_thread
        self._unmapped: dict[str, NewRequest] = {}  # requests whose memory is not mapped yet
        self._prefilling: set[str] = set()  # request ids in the prefill engine

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        for new in requests:
            super().add_requests([new])
            self._unmapped[new.request_id] = new

    def finish(self, request_id: str, reason: str, stop_reason: str | None = None) -> None:
        super().finish(request_id, reason, stop_reason)
        self._cancel_prefill(request_id)

    def step(self) -> CoreOutput:
        try:
            self._process_results()
            output = super().step()
            for update in output.updates:
                if update.finish_reason is not None:
                    self._cancel_prefill(update.request_id)
            if output.step is not None and output.step.out.is_empty:
                self._process_results(_POLL_INTERVAL_S)
        except RankError as error:
            self._kill(error)
            raise
        return output

    def check_health(self) -> None:
        try:
            super().check_health()
            self._prefill_thread.check_health()
        except RankError as error:
            self._kill(error)
            raise

    def reset(self) -> None:
        """Waits for transfers of the prefill engine before it releases the memory that they write to."""
        try:
            for request_id in self._prefilling:
                self._prefill_thread.abort(request_id)
            self._wait_for_prefills()
        except RankError as error:
            self._kill(error)
        finally:
            self._unmapped.clear()
            self._prefilling.clear()
            super().reset()

    def sleep(self, level: int = 1) -> None:
        super().sleep(level)
        self._prefill_thread.call(lambda core: core.sleep(level))

    def wake_up(self) -> None:
        self._prefill_thread.call(lambda core: core.wake_up())
        super().wake_up()

    def set_cache_budget(self, memory_bytes: int) -> None:
        """Each engine gets half of the budget."""
        self._prefill_thread.call(lambda core: core.set_cache_budget(memory_bytes))
        super().set_cache_budget(memory_bytes)

    def reset_prefix_cache(self) -> bool:
        return super().reset_prefix_cache() and self._prefill_thread.call(lambda core: core.reset_prefix_cache())

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """The sum of both engines. A token that neither engine has cached counts as two queries."""
        both = zip(super().prefix_cache_stats(), self._prefill_thread.stats.prefixes, strict=True)
        return PrefixCacheStats(*[decode + prefill for decode, prefill in both])

    def memory_stats(self) -> MemoryStats:
        """The sum of both engines. The prefill engine's part is less than a second old, or from when it became idle."""
        return MemoryStats.sum_of((super().memory_stats(), self._prefill_thread.stats.memory))

    def stats(self) -> CoreStats:
        """Rows and preemptions of both engines. Requests in the prefill engine are counted once, here."""
        decode, prefill = super().stats(), self._prefill_thread.stats
        return decode._replace(
            num_preemptions=decode.num_preemptions + prefill.num_preemptions,
            used_rows=decode.used_rows + prefill.used_rows,
            total_rows=decode.total_rows + prefill.total_rows,
        )

    def shutdown(self) -> None:
        try:
            super().shutdown()
        finally:
            self._prefill_thread.shutdown()

    def _launch(self, out: SchedulerOutput) -> StepFuture:
        """Send the ranks no step while all requests wait for the prefill engine."""
        return CompletedStep(StepResult(out.step_id)) if out.is_empty else super()._launch(out)

    def _updates(self, out: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        updates = super()._updates(out, result)
        if result.available_rows is None:
            self._start_prefills(out.received)
        return updates

    def _drain_steps(self) -> None:
        super()._drain_steps()
        self._wait_for_prefills()

    def _start_prefills(self, received: Sequence[Chunk]) -> None:
        """Submit prompts whose memory is now mapped on every rank."""
        for request_id, first in [(chunk.request_id, chunk.start) for chunk in received]:
            if self.scheduler.is_unfinished(request_id):
                self._prefilling.add(request_id)
                self._prefill_thread.submit(self._unmapped.pop(request_id), first)
            else:
                self.scheduler.end_receive(request_id, None)

    def _process_results(self, timeout_s: float = 0.0) -> None:
        """Process the prefill engine's results: requests whose prompts are computed continue here."""
        messages = self._prefill_thread.get_results(timeout_s)
        results = [each for each in messages if isinstance(each, PrefillResult)]
        self._pending_updates += [
            each
            for each in messages
            if not isinstance(each, PrefillResult) and self.scheduler.is_unfinished(each.request_id)
        ]
        if results:
            self.executor.ask("arrive", [self._arrival(each) for each in results])
        for request_id, _, update in results:
            self._prefilling.discard(request_id)
            self._pending_updates += self.scheduler.end_receive(request_id, update)

    def _arrival(self, result: PrefillResult) -> Arrival:
        update = result.update if self.scheduler.is_unfinished(result.request_id) else None
        token = update.tokens[0] if update is not None and update.tokens else None
        return Arrival(result.request_id, result.num_portions, token)

    def _cancel_prefill(self, request_id: str) -> None:
        """Stop the prefill of a request that has ended."""
        self._unmapped.pop(request_id, None)
        if request_id in self._prefilling:
            self._prefill_thread.abort(request_id)

    def _wait_for_prefills(self) -> None:
        while self._prefilling and self._prefill_thread.is_running:
            self._process_results(_POLL_INTERVAL_S)

    def _kill(self, error: RankError) -> None:
        """End both engines: neither can continue without the other."""
        self._prefilling.clear()
        for executor in (self._prefill_thread.executor, self.executor):
            executor.kill(str(error))
