"""Add requests to an engine at their times, and step it until all are answered."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sarathi.benchmark.outcome import COMPLETED, INTERRUPTED, TIME_LIMIT
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


@dataclass
class Served:
    """What came of it. ended: COMPLETED, TIME_LIMIT or INTERRUPTED. refused: request id -> why it was not taken."""

    ended: str = COMPLETED
    duration_s: float = 0.0
    num_finished: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    responses: list[dict[str, Any]] = field(default_factory=list)


class ServingLoop:
    """One workload on one engine. after_step is told the outputs of each step, and may look at the engine."""

    def __init__(self, engine: LLMEngine, prompts: PromptMaker, after_step: Listener, keep_responses: bool) -> None:
        self._engine, self._prompts, self._after_step = engine, prompts, after_step
        self._keep_responses = keep_responses
        self._open: set[str] = set()

    def serve(
        self, specs: Sequence[NumberedSpec], limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> Served:
        """Until all are answered, `limit_s` has passed, or ^C; requests that are still open are aborted."""
        served, start_s = Served(), clock()
        try:
            served.ended = self._serve(deque(specs), served, start_s, start_s + limit_s, clock)
        except KeyboardInterrupt:
            served.ended = INTERRUPTED
        served.duration_s = clock() - start_s
        self._end()
        return served

    def _serve(
        self, waiting: deque[NumberedSpec], served: Served, start_s: float, end_s: float, clock: Callable[[], float]
    ) -> str:
        while waiting or self._engine.num_unfinished:
            now_s = clock()
            if now_s >= end_s:
                return TIME_LIMIT
            while waiting and start_s + waiting[0].spec.arrived_at_s <= now_s:
                self._admit(waiting.popleft(), start_s, served)
            if self._engine.num_unfinished:
                self._step(served)
            elif waiting:
                until_s = min(start_s + waiting[0].spec.arrived_at_s, end_s)
                time.sleep(min(max(until_s - clock(), 0.0), LONGEST_WAIT_S))
        return COMPLETED

    def _admit(self, numbered: NumberedSpec, start_s: float, served: Served) -> None:
        """Time zero of a request is when it was due, not when the loop came round to it."""
        request_id, spec = str(numbered.number), numbered.spec
        params = SamplingParams(temperature=0.0, max_tokens=spec.num_decode_tokens, ignore_eos=True)
        token_ids = self._prompts.token_ids(spec, numbered.number)
        try:
            self._engine.add_request(request_id, token_ids, params, start_s + spec.arrived_at_s)
        except ValueError as error:
            logger.warning("request %s is refused: %s", request_id, error)
            served.refused[request_id] = str(error)
        else:
            self._open.add(request_id)

    def _step(self, served: Served) -> None:
        outputs = self._engine.step()
        for output in outputs:
            if output.finished:
                served.num_finished += 1
                self._open.discard(output.request_id)
                if self._keep_responses:
                    served.responses.append(_response(output))
        self._after_step(outputs)

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
