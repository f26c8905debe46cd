"""What a caller gets from each step: the state of a request and of its completions.

Nothing changes an output, but none is frozen: hundreds are built in a step, and frozen ones take three times as long.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Logprob(NamedTuple):
    """Natural logarithm of a token's probability, and the token as text."""

    logprob: float
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Token id -> Logprob: the chosen token first, then the most likely ones, best first."""


@dataclass(repr=False, eq=False, slots=True)
class CompletionOutput:
    """One of a request's n completions as of one step. It refers to lists that only grow, and copies nothing.

    text: all of it so far, without stop string and special tokens; it may lag behind the tokens by what is held back.
    delta: what the step added to `text`.
    finish_reason: "stop", "length", "abort" or "error"; None while it goes on.
    stop_reason: the stop string or stop token that ended it; None for the model's own end token, and for no stop.
    """

    index: int
    text: str
    delta: str
    num_tokens: int
    finish_reason: str | None
    stop_reason: int | str | None
    _token_ids: list[int]
    _logprobs: list[TokenLogprobs]

    @property
    def token_ids(self) -> list[int]:
        """Ids so far, the one that ended it included."""
        return self._token_ids[: self.num_tokens]

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """One entry a token; None unless asked for."""
        return self._logprobs[: self.num_tokens] or None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        shown = ("index", "text", "num_tokens", "finish_reason", "stop_reason")
        return f"CompletionOutput({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


@dataclass(slots=True)
class RequestMetrics:
    """Times by the engine's clock, in seconds; None while it has not happened. Shared by all outputs of a request."""

    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finish_time_s: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request as of one step. `prompt` is None where token ids came in; `outputs` holds all n completions.

    prompt_logprobs: one entry for each prompt token computed so far, None for the first; None unless asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
