"""Sampled tokens to outputs: text, stop strings, logprobs and times of requests; knows no scheduler and no cache.

One call of add_request is a Group of n Answers; each Answer follows one Request of the scheduler.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from sarathi.engine.outputs import Completion, CompletionOutput, Logprob, RequestMetrics, RequestOutput
from sarathi.messages import SampledToken
from sarathi.request import Request


class TextStream(Protocol):
    """What Detokenizer and SilentDetokenizer offer."""

    @property
    def matched_stop(self) -> str | None: ...

    def push(self, token_id: int, may_stop: bool = True) -> str: ...

    def flush(self) -> str: ...


class Answer:
    """One completion as it grows."""

    def __init__(self, request: Request, index: int, text: TextStream, piece: Callable[[int], str]) -> None:
        self.request = request
        self._index = index
        self._text = text
        self._piece = piece
        self._completion = Completion()
        self._delta = ""

    @property
    def matched_stop(self) -> str | None:
        return self._text.matched_stop

    def take(self, token: SampledToken) -> None:
        """Append a token. The request has seen it: a token that ended it is counted, but is not part of the text."""
        self._completion.token_ids.append(token.token_id)
        if token.logprob is not None:
            self._completion.logprobs.append(self._logprobs(token, token.logprob))
        if self.request.finish_reason != "stop":
            may_stop = len(self._completion.token_ids) >= self.request.sampling_params.min_tokens
            self._delta += self._text.push(token.token_id, may_stop)

    def output(self) -> CompletionOutput:
        """The answer as of now. A finished one first gives out what its text held back."""
        request, completion = self.request, self._completion
        if request.is_finished:
            self._delta += self._text.flush()
        delta, self._delta = self._delta, ""
        completion.text += delta
        num_tokens = len(completion.token_ids)
        return CompletionOutput(
            self._index, completion.text, delta, num_tokens, request.finish_reason, request.stop_reason, completion
        )

    def _logprobs(self, token: SampledToken, chosen: float) -> dict[int, Logprob]:
        pairs = [(token.token_id, chosen), *token.top_logprobs]
        return {token_id: Logprob(logprob, self._piece(token_id)) for token_id, logprob in pairs}


class Group:
    """The n answers to one prompt, and its times."""

    def __init__(self, request_id: str, prompt: str | None, answers: Sequence[Answer], metrics: RequestMetrics) -> None:
        self.request_id = request_id
        self.answers = answers
        self.metrics = metrics
        self._prompt = prompt

    def output(self, now_s: float) -> RequestOutput:
        """The request as of now; the first output, and the last, set the times."""
        outputs = [answer.output() for answer in self.answers]
        finished = None not in [output.finish_reason for output in outputs]
        if self.metrics.first_token_time_s is None and any(output.num_tokens for output in outputs):
            self.metrics.first_token_time_s = now_s
        if finished:
            self.metrics.finish_time_s = now_s
        prompt_ids = self.answers[0].request.prompt_token_ids
        return RequestOutput(self.request_id, self._prompt, prompt_ids, outputs, finished, self.metrics)
