"""Requests in, text out, one step at a time; knows no kernels and no pages.

Everything is handed in, so that a test can run the engine over a model of three lines; `from_config` builds the real
parts.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from sarathi.config.schema import EngineConfig
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.limits import RequestTooLongError
from sarathi.engine.input_processor import InputProcessor, Prompt, fan_out
from sarathi.engine.output_processor import Answer, Group
from sarathi.engine.outputs import RequestMetrics, RequestOutput
from sarathi.engine.tokenizer.detokenizer import Detokenizer, SilentDetokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.executor.base import Executor
from sarathi.messages import SampledToken, SchedulerOutput, StepFuture
from sarathi.metrics import MetricsSink, NullMetricsStore, StepTimes
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams


class Flight(NamedTuple):
    """A step in flight, and when it began and left."""

    out: SchedulerOutput
    pending: StepFuture
    start_s: float
    scheduled_s: float


class EngineShutDownError(RuntimeError):
    """A request for an engine whose model and memory are gone."""


class LLMEngine:
    """A scheduler, an executor and a tokenizer put together. One thread at a time may use it."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer | None,
        clock: Callable[[], float] = time.monotonic,
        metrics: MetricsSink | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.tokenizer = tokenizer
        self._clock = clock
        self._metrics = metrics or NullMetricsStore()
        self._inputs = InputProcessor(tokenizer, executor.vocab_size)
        self._flights: deque[Flight] = deque()
        self._groups: dict[str, Group] = {}
        self._answers: dict[str, tuple[Group, Answer]] = {}
        self._is_shut_down = False

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLMEngine":
        """The engine that `config` describes, its model loaded. Raises ValueErrors that name the setting at fault."""
        from sarathi.engine.build import build_parts  # imports torch

        return cls(*build_parts(config))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, be it only to free the memory of requests that have ended."""
        return not self._is_shut_down and (self.scheduler.has_work or bool(self._flights))

    @property
    def num_unfinished(self) -> int:
        """Requests that have been added and have not ended."""
        return len(self._groups)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request of this id has been added and has not ended."""
        return request_id in self._groups

    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams, arrival_time_s: float | None = None
    ) -> None:
        """Queue a prompt: text, or token ids. It is refused with a ValueError, and nothing else changes, where the id
        is in use, the prompt is empty or too long, or a parameter does not fit the model.

        arrival_time_s: by the engine's clock, where it came in before this call; None: now.
        """
        if self._is_shut_down:
            raise EngineShutDownError("the engine is shut down: it takes no more requests")
        token_ids = self._inputs.token_ids(prompt)
        self._inputs.check_params(sampling_params)
        metrics = RequestMetrics(self._clock() if arrival_time_s is None else arrival_time_s)
        answers = [
            self._answer(request_id, index, token_ids, params, metrics.arrival_time_s)
            for index, params in enumerate(fan_out(sampling_params))
        ]
        self._schedule(Group(request_id, prompt if isinstance(prompt, str) else None, answers, metrics))

    def step(self) -> list[RequestOutput]:
        """Start one batch and take in the oldest; the requests that got a token or ended in it, as they now stand.

        With an executor that has several steps in flight the answer to the first of them is empty. Where anything
        raises, be it Ctrl-C, every request in the engine ends without a last output, the error goes on to the caller,
        and the engine takes new requests.
        """
        try:
            if self.scheduler.has_work:
                self._flights.append(self._launch())
            return self._land() if self._must_land() else []
        except BaseException:
            self._give_up()
            raise

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its last output, or None if there is no such request (any more)."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for answer in group.answers:
            self.scheduler.finish(answer.request, "abort")
        return self._output(group, self._clock())

    def shutdown(self) -> None:
        """End every request, as a step that raises does, and give back the executor's memory and processes; the engine
        has no work and takes none afterwards. Idempotent."""
        self._is_shut_down = True
        try:
            self._give_up()
        finally:
            self.executor.shutdown()

    def _answer(
        self, request_id: str, index: int, token_ids: tuple[int, ...], params: SamplingParams, arrival_s: float
    ) -> Answer:
        name = request_id if index == 0 else f"{request_id}#{index}"
        ends = frozenset() if self.tokenizer is None else self.tokenizer.eos_token_ids
        request = Request(name, token_ids, params, arrival_s, ends)
        if self.tokenizer is None:
            return Answer(request, index, SilentDetokenizer(), str)
        return Answer(request, index, Detokenizer(self.tokenizer, params.stop), self.tokenizer.piece)

    def _schedule(self, group: Group) -> None:
        """All its answers or none. Of those that the scheduler finds too long metrics hear the arrival and the end."""
        named = {answer.request.request_id: (group, answer) for answer in group.answers}
        for name in named.keys() & self._answers.keys():
            raise ValueError(f"request id {name!r} belongs to a request that has not ended")
        try:
            self._add_all(group.answers)
        except RequestTooLongError:
            for answer in group.answers:
                self._metrics.on_request_arrived(answer.request)
                self._metrics.on_request_finished(answer.request)
            raise
        self._groups[group.request_id] = group
        self._answers.update(named)
        for answer in group.answers:
            self._metrics.on_request_arrived(answer.request)

    def _add_all(self, answers: Iterable[Answer]) -> None:
        """Where the scheduler refuses one, those before it are taken back."""
        try:
            for answer in answers:
                self.scheduler.add(answer.request)
        except BaseException:
            for answer in answers:
                self.scheduler.finish(answer.request, "error")
                answer.request.end("error")  # also where the scheduler never had it
            raise

    def _launch(self) -> Flight:
        start_s = self._clock()
        out = self.scheduler.schedule()
        scheduled_s = self._clock()
        self._mark_scheduled(out, start_s)
        return Flight(out, self.executor.launch(out), start_s, scheduled_s)

    def _must_land(self) -> bool:
        """Whether to wait for the oldest step: there is no room for one more, or nothing to put into it."""
        if not self._flights:
            return False
        is_full = len(self._flights) >= self.executor.max_in_flight
        return is_full or not self._flights[-1].out.chunks or not self.scheduler.has_work

    def _land(self) -> list[RequestOutput]:
        flight = self._flights[0]
        result = flight.pending.result()
        self._flights.popleft()
        executed_s = self._clock()
        progressed = self.scheduler.update(flight.out, result)
        outputs = self._outputs(progressed, result.tokens)
        times = StepTimes(flight.start_s, flight.scheduled_s, executed_s, self._clock())
        self._metrics.on_step(flight.out, result, times)
        return outputs

    def _give_up(self) -> None:
        """Every request ends, once no step is under way: its memory must not be taken from under it."""
        try:
            self._wait_for_steps()
        finally:
            self._flights.clear()
            self.scheduler.reset()
            for _, answer in self._answers.values():
                self._metrics.on_request_finished(answer.request)
            self._groups.clear()
            self._answers.clear()

    def _wait_for_steps(self) -> None:
        """For the flights, then for all that the executor has under way, whatever ends the first wait.

        Ctrl-C may have come before a step had its place among the flights, and another one while they were waited for.
        """
        try:
            for flight in self._flights:
                with suppress(Exception):
                    flight.pending.result()
        finally:
            with suppress(Exception):
                self.executor.wait()

    def _mark_scheduled(self, out: SchedulerOutput, start_s: float) -> None:
        for new in out.new_requests:
            metrics = self._answers[new.request_id][0].metrics
            if metrics.first_scheduled_time_s is None:
                metrics.first_scheduled_time_s = start_s

    def _outputs(self, progressed: Iterable[Request], tokens: Iterable[SampledToken]) -> list[RequestOutput]:
        by_request = {token.request_id: token for token in tokens}
        touched = {}
        for request in progressed:
            group, answer = self._answers[request.request_id]
            token = by_request.get(request.request_id)
            if token is not None:
                self._take(answer, token)
            touched[group.request_id] = group
        now_s = self._clock()
        return [self._output(group, now_s) for group in touched.values()]

    def _take(self, answer: Answer, token: SampledToken) -> None:
        answer.take(token)
        if answer.matched_stop is not None:
            self.scheduler.finish(answer.request, "stop", answer.matched_stop)
            answer.request.end("stop", answer.matched_stop)  # even where the same token was the last that is allowed

    def _output(self, group: Group, now_s: float) -> RequestOutput:
        output = group.output(now_s)
        if output.finished:
            del self._groups[group.request_id]
            for answer in group.answers:
                self._metrics.on_request_finished(answer.request)
                del self._answers[answer.request.request_id]
        return output
