"""The engine that computes prompts for another one, in a thread of its own."""

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
_STATS_S = 0.5  # between two looks at a core that is busy
_LOOK_S = 0.1  # at a thread that may have ended


class Prefilled(NamedTuple):
    """A prompt of which no more will be sent. num_portions: that were. update: with its token, or without one where it
    could not be computed; None where it was aborted."""

    request_id: str
    num_portions: int
    update: RequestUpdate | None


class PrefillCore(EngineCore):
    """Computes prompts and the token behind each, and tells its ranks what to send."""

    executor: RanksExecutor

    def __init__(
        self, scheduler: Scheduler, executor: RanksExecutor, portions: Portions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(scheduler, executor, clock, CacheBudget(scheduler, executor, NUM_ENGINES))
        self._portions = portions
        self._aborted: list[str] = []

    def prefill(self, new: NewRequest, first: int) -> None:
        """Queue a prompt, which is sent from token `first` on. One `Prefilled` will follow: at once where the prompt is
        too long for this cache."""
        params = new.sampling_params
        one = replace(params, max_tokens=1, min_tokens=min(params.min_tokens, 1))
        self._portions.add(new, first)
        try:
            self.add_requests([replace(new, sampling_params=one)])
        except ValueError as error:
            self._untold.append(RequestUpdate(new.request_id, (), "error", str(error)))

    def abort(self, request_id: str) -> None:
        """Compute no more of a prompt. A `Prefilled` follows when nothing of it is left in a step."""
        self.finish(request_id, "abort")
        self._aborted.append(request_id)

    def progress(self) -> Iterator[Prefilled | RequestUpdate]:
        """One step, if there is work: prompts that are done, and log probabilities of others' tokens."""
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

    def _complete(self, out: SchedulerOutput) -> SchedulerOutput:
        return replace(out, sent=self._portions.plan(out.step_id, out.chunks))

    def _updates(self, out: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        """A step that found too little memory sent nothing, and neither do those behind it."""
        (self._portions.complete if result.available_rows is None else self._portions.take_back)(out.step_id)
        return super()._updates(out, result)

    def _ended(self, request_id: str, update: RequestUpdate | None) -> Iterator[Prefilled]:
        if (count := self._portions.finish(request_id)) is not None:
            yield Prefilled(request_id, count, update)


class Prefills:
    """A PrefillCore in a thread of its own, which alone uses it. Its methods belong to the other engine's thread.

    stats: of the core, when it had done its last work, or less than a second ago.
    """

    def __init__(self, core: PrefillCore) -> None:
        self.executor, self.stats = core.executor, core.stats()
        self._core = core
        self._looked_at_s = time.monotonic()
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._done: SimpleQueue[Prefilled | RequestUpdate] = SimpleQueue()
        self._error: Exception | None = None  # that ended the thread
        self._thread = threading.Thread(target=self._run, name="prefill", daemon=True)
        self._thread.start()

    def start(self, new: NewRequest, first: int) -> None:
        """See `PrefillCore.prefill`."""
        self._work.put(partial(self._core.prefill, new, first))

    def abort(self, request_id: str) -> None:
        """See `PrefillCore.abort`."""
        self._work.put(partial(self._core.abort, request_id))

    def take(self, timeout_s: float = 0.0) -> Sequence[Prefilled | RequestUpdate]:
        """What is there; waits so long for a first one. Raises RankError where the thread has ended."""
        found: list[Prefilled | RequestUpdate] = []
        try:
            while True:
                found.append(
                    self._done.get(timeout=0 if found else timeout_s) if timeout_s else self._done.get_nowait()
                )
        except Empty:
            if not found:
                self.check_life()
            return found

    def check_life(self) -> None:
        """Raise RankError where the thread has ended, as it does soon after one of its ranks."""
        if self._error is not None:
            raise self._failure() from self._error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def call(self, method: Callable[[PrefillCore], T]) -> T:
        """Between two steps. Raises RankError where the thread has ended."""
        done: Future[T] = Future()
        self._work.put(partial(self._answer, done, method))
        while self.is_running and not done.done():
            wait([done], timeout=_LOOK_S)
        if not done.done():
            raise self._failure()
        return done.result()

    def shutdown(self) -> None:
        """Free the engine's memory. Idempotent."""
        self._work.put(None)
        self._thread.join()
        self._core.shutdown()
        self._look()

    def _run(self) -> None:
        try:
            while self._obey():
                for each in self._core.progress():
                    self._done.put(each)
                if not self._core.has_work or time.monotonic() - self._looked_at_s > _STATS_S:
                    self._look()
        except Exception as error:
            logger.exception("the engine that computes prompts has ended")
            self._error = error

    def _obey(self) -> bool:
        """Run what is asked for; waits for it where there is no other work. False: end."""
        wait = not self._core.has_work
        while wait or not self._work.empty():
            if (each := self._next()) is None:
                return False
            each()
            wait = False
        return True

    def _next(self) -> Callable[[], None] | None:
        """What is asked for next."""
        while True:
            with suppress(Empty):
                return self._work.get(timeout=self.executor.look_s)
            self._core.check_life()

    def _answer(self, future: Future[T], method: Callable[[PrefillCore], T]) -> None:
        try:
            answer = method(self._core)
            self._look()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(answer)

    def _look(self) -> None:
        self.stats, self._looked_at_s = self._core.stats(), time.monotonic()

    def _failure(self) -> RankError:
        error = self._error
        if isinstance(error, RankError):
            return RankError(str(error))
        reason = "it was closed" if error is None else f"{type(error).__name__}: {error}"
        return RankError(f"the engine that computes prompts has ended: {reason}")
