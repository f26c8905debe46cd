"""Add requests to an engine at their times, and step it until all are answered."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sarathi.benchmark.run.outcome import COMPLETED, INTERRUPTED, TIME_LIMIT
from sarathi.benchmark.workload import RequestSpec
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.engine.llm_engine import LLMEngine
from sarathi.engine.outputs import RequestOutput
from sarathi.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 0.05  # so that ^C and the time limit are noticed
Listener = Callable[[Sequence[RequestOutput]], None]


@dataclass(frozen=True)
class NumberedSpec:
    """A request with its number in the whole workload, which is its id and decides its prompt."""

    number: int
    spec: RequestSpec

    @property
    def place(self) -> int:
        """By which replicas divide the requests: all turns of a conversation have one."""
        return self.number if self.spec.conversation is None else self.spec.conversation


class _Due(NamedTuple):
    """A request that can be sent. before: its conversation up to this turn."""

    at_s: float
    number: int
    spec: RequestSpec
    before: Sequence[int] = ()


class _Waiting:
    """Requests by the time when they are due, and the turns of conversations that wait for an answer."""

    def __init__(self, specs: Sequence[NumberedSpec], start_s: float) -> None:
        self._due: list[_Due] = []
        self._turns: dict[int, deque[NumberedSpec]] = {}
        for each in specs:
            talk = each.spec.conversation
            if talk in self._turns:
                self._turns[talk].append(each)
                continue
            if talk is not None:
                self._turns[talk] = deque()
            heapq.heappush(self._due, _Due(start_s + each.spec.arrived_at_s, each.number, each.spec))

    def __bool__(self) -> bool:
        return bool(self._due)

    @property
    def next_at_s(self) -> float:
        """When the first of them is due."""
        return self._due[0].at_s

    def pop(self) -> _Due:
        """Remove the first."""
        return heapq.heappop(self._due)

    def answer(self, talk: int, tokens: Sequence[int], now_s: float) -> None:
        """A conversation has come so far: its next turn, if there is one, is due after the time to think."""
        if self._turns[talk]:
            turn = self._turns[talk].popleft()
            heapq.heappush(self._due, _Due(now_s + turn.spec.arrived_at_s, turn.number, turn.spec, tokens))


@dataclass
class Served:
    """What came of it. ended: COMPLETED, TIME_LIMIT or INTERRUPTED. refused: request id -> why it was not taken.

    num_cached_tokens: prompt tokens of finished requests that the cache had.
    """

    ended: str = COMPLETED
    duration_s: float = 0.0
    num_finished: int = 0
    num_cached_tokens: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    responses: list[dict[str, Any]] = field(default_factory=list)


class ServingLoop:
    """One workload on one engine. after_step is told the outputs of each step, and may look at the engine.

    stop: where it is set, the run ends as at ^C.
    """

    def __init__(
        self, engine: LLMEngine, prompts: PromptMaker, after_step: Listener, keep_responses: bool,
        stop: threading.Event | None = None,
    ) -> None:  # fmt: skip
        self._engine, self._prompts, self._after_step = engine, prompts, after_step
        self._keep_responses, self._stop = keep_responses, stop or threading.Event()
        self._open: dict[str, RequestSpec] = {}

    def serve(
        self, specs: Sequence[NumberedSpec], limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> Served:
        """Until all are answered, `limit_s` has passed, or ^C; requests that are still open are aborted."""
        served, start_s = Served(), clock()
        try:
            served.ended = self._serve(_Waiting(specs, start_s), served, start_s + limit_s, clock)
        except KeyboardInterrupt:
            served.ended = INTERRUPTED
        served.duration_s = clock() - start_s
        self._end()
        return served

    def _serve(self, waiting: _Waiting, served: Served, end_s: float, clock: Callable[[], float]) -> str:
        while waiting or self._engine.num_unfinished:
            now_s = clock()
            if self._stop.is_set():
                return INTERRUPTED
            if now_s >= end_s:
                return TIME_LIMIT
            while waiting and waiting.next_at_s <= now_s:
                self._admit(waiting.pop(), served)
            if self._engine.num_unfinished:
                for output in self._step(served):
                    self._go_on(output, waiting, clock())
            elif waiting:
                until_s = min(waiting.next_at_s, end_s)
                time.sleep(min(max(until_s - clock(), 0.0), LONGEST_WAIT_S))
        return COMPLETED

    def _admit(self, due: _Due, served: Served) -> None:
        """Time zero of a request is when it was due, not when the loop came round to it."""
        request_id, spec = str(due.number), due.spec
        params = SamplingParams(temperature=0.0, max_tokens=spec.num_decode_tokens, ignore_eos=True)
        token_ids = self._prompts.token_ids(spec, due.number, due.before)
        try:
            self._engine.add_request(request_id, token_ids, params, due.at_s)
        except ValueError as error:
            logger.warning("request %s is refused: %s", request_id, error)
            served.refused[request_id] = str(error)
        else:
            self._open[request_id] = spec

    def _step(self, served: Served) -> list[RequestOutput]:
        """The outputs of requests that have ended."""
        outputs = self._engine.step()
        ended = [output for output in outputs if output.finished]
        served.num_finished += len(ended)
        served.num_cached_tokens += sum(output.num_cached_tokens for output in ended)
        if self._keep_responses:
            served.responses += map(_response, ended)
        self._after_step(outputs)
        return ended

    def _go_on(self, output: RequestOutput, waiting: _Waiting, now_s: float) -> None:
        """A request has ended: the next turn of its conversation follows."""
        talk = self._open.pop(output.request_id).conversation
        if talk is not None:
            waiting.answer(talk, [*output.prompt_token_ids, *output.outputs[0].token_ids], now_s)

    def _end(self) -> None:
        """Nothing of this workload is left in the engine, so that the next one finds all of its memory."""
        for request_id in self._open:
            self._engine.abort(request_id)
        self._open.clear()
        self._engine.release_ended()


def _response(output: RequestOutput) -> dict[str, Any]:
    (answer,) = output.outputs
    return {
        "request_id": output.request_id,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
    }
