"""Turns the core's updates into outputs: text, stop strings, logprobs and request times.

Every request ends here for its caller and for the metrics, whatever the reason.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sarathi.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from sarathi.engine.tokenizer.detokenizer import Detokenizer, SilentDetokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.messages import CoreOutput, NewRequest, PromptLogprobs, RequestUpdate, SampledToken
from sarathi.metrics import MetricsSink


class Completion:
    """One of the n completions of a prompt. Its lists are append-only, so outputs can share them."""

    def __init__(self, state: "RequestState", request: NewRequest, index: int, tokenizer: Tokenizer | None) -> None:
        self.state = state
        self.request_id = request.request_id
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._index = index
        self._params = params = request.sampling_params
        shown = tokenizer if params.detokenize else None
        self._token_text = str if shown is None else shown.piece
        self._detokenizer = SilentDetokenizer() if shown is None else Detokenizer(
            shown, params.stop, include_stop=params.include_stop_str_in_output, skip_special=params.skip_special_tokens,
            spaces_between_special=params.spaces_between_special_tokens,
        )  # fmt: skip
        self._text = self._delta = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def append(self, update: RequestUpdate) -> str | None:
        """Append an update's tokens, up to the one that completes a stop string. Returns that stop string.

        A stop token is counted, but excluded from the text unless include_stop_str_in_output is set.
        """
        hides_last = update.finish_reason == "stop" and not self._params.include_stop_str_in_output
        num_shown = len(update.tokens) - hides_last
        for number, token in enumerate(update.tokens):
            self._token_ids.append(token.token_id)
            if token.logprob is not None:
                self._logprobs.append(self.token_logprobs(token))
            if number < num_shown:
                may_stop = len(self._token_ids) > self._params.min_tokens
                self._delta += self._detokenizer.push(token.token_id, may_stop)
                if self._detokenizer.matched_stop is not None:
                    return self._detokenizer.matched_stop
        return None

    def output(self) -> CompletionOutput:
        """The current output. A finished completion also returns the text that was held back."""
        if self.finish_reason is not None:
            self._delta += self._detokenizer.flush()
        delta, self._delta = self._delta, ""
        self._text += delta
        return CompletionOutput(
            self._index, self._text, delta, len(self._token_ids), self.finish_reason, self.stop_reason,
            self._token_ids, self._logprobs,
        )  # fmt: skip

    def token_logprobs(self, token: SampledToken) -> TokenLogprobs:
        """A token's logprob, followed by those of the most likely tokens."""
        pairs = [(token.token_id, token.logprob or 0.0), *token.top_logprobs]
        return {token_id: Logprob(logprob, self._token_text(token_id)) for token_id, logprob in pairs}


class RequestState:
    """A prompt, its n completions and its times."""

    def __init__(
        self, request_id: str, prompt: str | None, requests: Sequence[NewRequest], tokenizer: Tokenizer | None,
        arrived_at_s: float,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.metrics = RequestMetrics(arrived_at_s)
        self.completions = [Completion(self, request, index, tokenizer) for index, request in enumerate(requests)]
        self.num_open = len(self.completions)  # completions that have not ended
        self.prompt_token_ids = tuple(requests[0].token_ids)
        self.num_cached_tokens = 0  # of the first completion; the others always find its prompt
        self._prompt = prompt
        with_logprobs = requests[0].sampling_params.prompt_logprobs is not None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] if with_logprobs else None

    def append_prompt_logprobs(self, new: PromptLogprobs) -> None:
        """Append logprobs; ignores positions that were recomputed after a preemption."""
        if self._prompt_logprobs is not None:
            show = self.completions[0].token_logprobs
            self._prompt_logprobs += map(show, new.tokens[len(self._prompt_logprobs) - new.start :])

    def output(self, now_s: float) -> RequestOutput:
        """The current output. Sets the first-token and finish times when they occur."""
        outputs = [completion.output() for completion in self.completions]
        finished = not self.num_open
        if self.metrics.first_token_time_s is None and any(output.num_tokens for output in outputs):
            self.metrics.first_token_time_s = now_s
        if finished:
            self.metrics.finish_time_s = now_s
        logprobs = self._prompt_logprobs and list(self._prompt_logprobs)
        return RequestOutput(
            self.request_id, self._prompt, self.prompt_token_ids, outputs, finished, self.metrics, logprobs,
            self.num_cached_tokens,
        )  # fmt: skip


class StopFound(NamedTuple):
    """A request that a stop string ended. The core must be notified."""

    request_id: str
    stop: str


class OutputProcessor:
    """Tracks all unfinished requests and builds their outputs."""

    def __init__(
        self, tokenizer: Tokenizer | None, clock: Callable[[], float], metrics: MetricsSink | None = None
    ) -> None:
        self.states: dict[str, RequestState] = {}
        self._completions: dict[str, Completion] = {}
        self._tokenizer = tokenizer
        self._clock = clock
        self._metrics = metrics

    def add(
        self, request_id: str, prompt: str | None, requests: Sequence[NewRequest], arrived_at_s: float
    ) -> RequestState:
        """Track the completions of one prompt. ValueError if one of their ids is in use."""
        for name in [request.request_id for request in requests if request.request_id in self._completions]:
            raise ValueError(f"request id {name!r} belongs to a request that has not ended")
        state = RequestState(request_id, prompt, requests, self._tokenizer, arrived_at_s)
        self.states[request_id] = state
        for completion in state.completions:
            self._completions[completion.request_id] = completion
            if self._metrics is not None:
                self._metrics.on_request_arrived(completion.request_id, len(state.prompt_token_ids), arrived_at_s)
        return state

    def find(self, completion_id: str) -> RequestState | None:
        """The request that a completion belongs to; None if it has ended."""
        completion = self._completions.get(completion_id)
        return None if completion is None else completion.state

    def process(self, message: CoreOutput) -> tuple[list[RequestOutput], list[StopFound]]:
        """Returns outputs of requests with new tokens or that ended, and the stop strings found.

        Drops updates of requests that ended here while a step with them was running.
        """
        touched: dict[str, RequestState] = {}
        found = []
        self._set_scheduled_times(message.first_scheduled, message.scheduled_at_s)
        for update in message.updates:
            completion = self._completions.get(update.request_id)
            if completion is None:
                continue
            touched[completion.state.request_id] = completion.state
            if update.num_cached_tokens and completion is completion.state.completions[0]:
                completion.state.num_cached_tokens = update.num_cached_tokens
            if update.prompt_logprobs is not None:
                completion.state.append_prompt_logprobs(update.prompt_logprobs)
            stop = completion.append(update)
            if stop is not None:  # takes precedence over the core's finish reason
                found.append(StopFound(update.request_id, stop))
                self._end(completion, "stop", stop)
            elif update.finish_reason is not None:
                self._end(completion, update.finish_reason, update.stop_reason)
        now_s = self._clock()
        return [state.output(now_s) for state in touched.values()], found

    def end(self, state: RequestState, reason: str) -> RequestOutput:
        """End all open completions of a request and return its final output."""
        for completion in state.completions:
            if completion.finish_reason is None:
                self._end(completion, reason)
        return state.output(self._clock())

    def end_all(self, reason: str) -> None:
        """End every request without a final output, even if an exception left some half updated."""
        try:
            for completion in list(self._completions.values()):
                if completion.finish_reason is None:
                    self._end(completion, reason)
        finally:
            self.states.clear()
            self._completions.clear()

    def _end(self, completion: Completion, reason: str, stop_reason: int | str | None = None) -> None:
        completion.finish_reason, completion.stop_reason = reason, stop_reason
        if self._metrics is not None:
            self._metrics.on_request_finished(completion.request_id, reason)
        state = completion.state
        state.num_open -= 1
        if not state.num_open:
            del self.states[state.request_id]
            for each in state.completions:
                del self._completions[each.request_id]

    def _set_scheduled_times(self, request_ids: Iterable[str], scheduled_at_s: float) -> None:
        for request_id in request_ids:
            completion = self._completions.get(request_id)
            if completion is not None and completion.state.metrics.first_scheduled_time_s is None:
                completion.state.metrics.first_scheduled_time_s = scheduled_at_s
