"""The prefill engine of prefill/decode disaggregation. It runs in a thread of its own."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

from sarathi.core.scheduler import Scheduler
from sarathi.engine.cache_budget.budget import CacheBudget
from sarathi.engine.core import EngineCore
from sarathi.executor.ranks.executor import RanksExecutor
from sarathi.executor.ranks.group import RankError
from sarathi.messages import NewRequest, RequestUpdate, SchedulerOutput, StepResult
from sarathi.transfer.portions import Portions

T = TypeVar("T")
logger = logging.getLogger(__name__)
NUM_ENGINES = 2
_STATS_INTERVAL_S = 0.5  # between two refreshes of the stats of a busy core
_POLL_INTERVAL_S = 0.1  # at a thread that may have ended


class PrefillResult(NamedTuple):
    """A prompt whose transfer has ended. num_portions: portions sent. update: contains the first token, or no token if
    the prompt could not be computed; None if it was aborted."""

    request_id: str
    num_portions: int
    update: RequestUpdate | None


class PrefillCore(EngineCore):
    """Computes prompts and their first tokens, and tells its ranks which portions to send."""

    executor: RanksExecutor

    def __init__(
        self, scheduler: Scheduler, executor: RanksExecutor, portions: Portions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(scheduler, executor, clock, CacheBudget(scheduler, executor, NUM_ENGINES))
        self._portions = portions
        self._aborted: list[str] = []

    def prefill(self, new: NewRequest, first: int) -> None:
        """Queue a prompt and send it from token `first` on. One `PrefillResult` follows, at once if the prompt is too
        long for this cache."""
        params = new.sampling_params
        one = replace(params, max_tokens=1, min_tokens=min(params.min_tokens, 1))
        self._portions.add(new, first)
        try:
            self.add_requests([replace(new, sampling_params=one)])
        except ValueError as error:
            self._pending_updates.append(RequestUpdate(new.request_id, (), "error", str(error)))

    def abort(self, request_id: str) -> None:
        """Stop computing a prompt. Its `PrefillResult` follows once no step in flight contains it."""
        self.finish(request_id, "abort")
        self._aborted.append(request_id)

    def progress(self) -> Iterator[PrefillResult | RequestUpdate]:
        """Run one step if there is work. Yields finished prompts, and updates with the prompts' log probabilities."""
        output = self.step() if self.has_work else None
        for update in () if output is None else output.updates:
            if update.prompt_logprobs is not None:
                yield update
            else:
                yield from self._ended(update.request_id, update)
        in_flight = {portion.request_id for step in self._steps for portion in step.out.sent}
        aborted, self._aborted = self._aborted, [each for each in self._aborted if each in in_flight]
        for request_id in aborted:
            if request_id not in in_flight:
                yield from self._ended(request_id, None)

    def _finalize(self, out: SchedulerOutput) -> SchedulerOutput:
        return replace(out, sent=self._portions.plan(out.step_id, out.chunks))

    def _updates(self, out: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        """A step that lacked memory sent nothing; the steps launched after it send nothing either."""
        (self._portions.complete if result.available_rows is None else self._portions.roll_back)(out.step_id)
        return super()._updates(out, result)

    def _ended(self, request_id: str, update: RequestUpdate | None) -> Iterator[PrefillResult]:
        if (count := self._portions.finish(request_id)) is not None:
            yield PrefillResult(request_id, count, update)


class PrefillThread:
    """Runs a PrefillCore in a thread. Only the decode engine's thread may call the methods.

    stats: of the core, less than a second old or from when the core became idle.
    """

    def __init__(self, core: PrefillCore) -> None:
        self.executor, self.stats = core.executor, core.stats()
        self._core = core
        self._refreshed_at_s = time.monotonic()
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._results: SimpleQueue[PrefillResult | RequestUpdate] = SimpleQueue()
        self._error: Exception | None = None  # that ended the thread
        self._thread = threading.Thread(target=self._run, name="prefill", daemon=True)
        self._thread.start()

    def submit(self, new: NewRequest, first: int) -> None:
        """See `PrefillCore.prefill`."""
        self._commands.put(partial(self._core.prefill, new, first))

    def abort(self, request_id: str) -> None:
        """See `PrefillCore.abort`."""
        self._commands.put(partial(self._core.abort, request_id))

    def get_results(self, timeout_s: float = 0.0) -> Sequence[PrefillResult | RequestUpdate]:
        """All queued results; waits up to timeout_s for the first. Raises RankError if the thread has ended."""
        found: list[PrefillResult | RequestUpdate] = []
        try:
            while True:
                found.append(
                    self._results.get(timeout=0 if found else timeout_s) if timeout_s else self._results.get_nowait()
                )
        except Empty:
            if not found:
                self.check_health()
            return found

    def check_health(self) -> None:
        """Raise RankError if the thread has ended. It ends soon after one of its ranks does."""
        if self._error is not None:
            raise self._failure() from self._error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def call(self, method: Callable[[PrefillCore], T]) -> T:
        """Run a function on the core between two steps. Raises RankError if the thread has ended."""
        done: Future[T] = Future()
        self._commands.put(partial(self._resolve, done, method))
        while self.is_running and not done.done():
            wait([done], timeout=_POLL_INTERVAL_S)
        if not done.done():
            raise self._failure()
        return done.result()

    def shutdown(self) -> None:
        """Free the engine's memory. Idempotent."""
        self._commands.put(None)
        self._thread.join()
        self._core.shutdown()
        self._refresh_stats()

    def _run(self) -> None:
        try:
            while self._run_commands():
                for each in self._core.progress():
                    self._results.put(each)
                if not self._core.has_work or time.monotonic() - self._refreshed_at_s > _STATS_INTERVAL_S:
                    self._refresh_stats()
        except Exception as error:
            logger.exception("the prefill engine has ended")
            self._error = error

    def _run_commands(self) -> bool:
        """Run the queued commands; wait for one if the core has no work. False: the thread must end."""
        wait = not self._core.has_work
        while wait or not self._commands.empty():
            if (command := self._next_command()) is None:
                return False
            command()
            wait = False
        return True

    def _next_command(self) -> Callable[[], None] | None:
        """Wait for a command; check the ranks' health meanwhile."""
        while True:
            with suppress(Empty):
                return self._commands.get(timeout=self.executor.health_check_interval_s)
            self._core.check_health()

    def _resolve(self, future: Future[T], method: Callable[[PrefillCore], T]) -> None:
        try:
            answer = method(self._core)
            self._refresh_stats()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(answer)

    def _refresh_stats(self) -> None:
        self.stats, self._refreshed_at_s = self._core.stats(), time.monotonic()

    def _failure(self) -> RankError:
        error = self._error
        if isinstance(error, RankError):
            return RankError(str(error))
        reason = "it was closed" if error is None else f"{type(error).__name__}: {error}"
        return RankError(f"the prefill engine has ended: {reason}")
