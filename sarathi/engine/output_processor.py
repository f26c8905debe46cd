"""The core's updates to outputs: text, stop strings, logprobs and times of requests.

The only place where a request ends for its caller and for the metrics, whatever ended it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sarathi.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from sarathi.engine.tokenizer.detokenizer import Detokenizer, SilentDetokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.messages import CoreOutput, NewRequest, PromptLogprobs, RequestUpdate, SampledToken
from sarathi.metrics import MetricsSink


class Completion:
    """One of the n completions of a prompt, as it grows. Lists only grow, so that outputs can refer to them."""

    def __init__(self, state: "RequestState", request: NewRequest, index: int, tokenizer: Tokenizer | None) -> None:
        self.state = state
        self.request_id = request.request_id
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._index = index
        self._params = params = request.sampling_params
        shown = tokenizer if params.detokenize else None
        self._show_token = str if shown is None else shown.piece
        self._detokenizer = SilentDetokenizer() if shown is None else Detokenizer(
            shown, params.stop, include_stop=params.include_stop_str_in_output, skip_special=params.skip_special_tokens,
            spaces_between_special=params.spaces_between_special_tokens,
        )  # fmt: skip
        self._text = self._delta = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def append(self, update: RequestUpdate) -> str | None:
        """Take in an update's tokens up to the one that completes a stop string, which is returned.

        A token that the core stopped at is counted, but is not part of the text unless that was asked for.
        """
        is_hidden = update.finish_reason == "stop" and not self._params.include_stop_str_in_output
        num_shown = len(update.tokens) - is_hidden
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
        """The completion as of now; one that has ended first releases the text that was held back."""
        if self.finish_reason is not None:
            self._delta += self._detokenizer.flush()
        delta, self._delta = self._delta, ""
        self._text += delta
        return CompletionOutput(
            self._index, self._text, delta, len(self._token_ids), self.finish_reason, self.stop_reason,
            self._token_ids, self._logprobs,
        )  # fmt: skip

    def token_logprobs(self, token: SampledToken) -> TokenLogprobs:
        """Of a token that has logprobs: its own first, then those of the most likely ones."""
        pairs = [(token.token_id, token.logprob or 0.0), *token.top_logprobs]
        return {token_id: Logprob(logprob, self._show_token(token_id)) for token_id, logprob in pairs}


class RequestState:
    """A prompt with its n completions, and its times."""

    def __init__(
        self, request_id: str, prompt: str | None, requests: Sequence[NewRequest], tokenizer: Tokenizer | None,
        arrived_at_s: float,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.metrics = RequestMetrics(arrived_at_s)
        self.completions = [Completion(self, request, index, tokenizer) for index, request in enumerate(requests)]
        self.num_open = len(self.completions)  # of them, how many have not ended
        self.prompt_token_ids = tuple(requests[0].token_ids)
        self.num_cached_tokens = 0  # of the first completion: the others find its prompt
        self._prompt = prompt
        with_logprobs = requests[0].sampling_params.prompt_logprobs is not None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] if with_logprobs else None

    def append_prompt_logprobs(self, new: PromptLogprobs) -> None:
        """Positions that were computed a second time are left as they are."""
        if self._prompt_logprobs is not None:
            show = self.completions[0].token_logprobs
            self._prompt_logprobs += map(show, new.tokens[len(self._prompt_logprobs) - new.start :])

    def output(self, now_s: float) -> RequestOutput:
        """The request as of now; its first output, and its last, set the times."""
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
    """A request that a stop string ended, of which the core has yet to hear."""

    request_id: str
    stop: str


class OutputProcessor:
    """Every request that has not ended, as its caller sees it."""

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
        """Expect updates of the completions of one prompt. ValueError where an id of them is in use."""
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
        """The request that a completion belongs to; None where it has ended."""
        completion = self._completions.get(completion_id)
        return None if completion is None else completion.state

    def process(self, message: CoreOutput) -> tuple[list[RequestOutput], list[StopFound]]:
        """Outputs of the requests that got a token or ended, and the stop strings found.

        Updates of requests that ended here while a step with them was running are dropped.
        """
        touched: dict[str, RequestState] = {}
        found = []
        self._note_scheduled(message.first_scheduled, message.scheduled_at_s)
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
            if stop is not None:  # also where the core ended it with the same token
                found.append(StopFound(update.request_id, stop))
                self._end(completion, "stop", stop)
            elif update.finish_reason is not None:
                self._end(completion, update.finish_reason, update.stop_reason)
        now_s = self._clock()
        return [state.output(now_s) for state in touched.values()], found

    def end(self, state: RequestState, reason: str) -> RequestOutput:
        """The last output of a request whose open completions all end now, for one reason."""
        for completion in state.completions:
            if completion.finish_reason is None:
                self._end(completion, reason)
        return state.output(self._clock())

    def end_all(self, reason: str) -> None:
        """End every request without a last output, also where an exception left them half updated."""
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

    def _note_scheduled(self, request_ids: Iterable[str], scheduled_at_s: float) -> None:
        for request_id in request_ids:
            completion = self._completions.get(request_id)
            if completion is not None and completion.state.metrics.first_scheduled_time_s is None:
                completion.state.metrics.first_scheduled_time_s = scheduled_at_s
