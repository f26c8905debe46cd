"""What a caller gets back from each step: the state of a request's completions; knows no scheduler and no tokenizer.

Outputs are not frozen although nothing changes them: hundreds are built in a step, and frozen ones take thrice as long.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Logprob(NamedTuple):
    """Natural logarithm of a token's probability, and the token as text."""

    logprob: float
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Token id -> Logprob: the chosen token first, then the most likely ones, best first."""


class Completion:
    """One growing answer. Lists only grow, so that a CompletionOutput can refer to their beginnings without a copy."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []


@dataclass(repr=False, eq=False, slots=True)
class CompletionOutput:
    """One of a request's n answers as of one step; building it costs the same however long the answer is.

    text: all of it so far, without stop string and special tokens; it may lag behind the tokens by what is held back.
    delta: what the step added to `text`.
    finish_reason: "stop", "length", "abort" or "error"; None while it goes on.
    stop_reason: the stop string or stop token that ended it; None for the model's own end token.
    """

    index: int
    text: str
    delta: str
    num_tokens: int
    finish_reason: str | None
    stop_reason: int | str | None
    _completion: Completion

    @property
    def token_ids(self) -> list[int]:
        """Ids so far, the one that ended it included."""
        return self._completion.token_ids[: self.num_tokens]

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """One entry a token; None unless asked for."""
        return self._completion.logprobs[: self.num_tokens] or None

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
    """A request as of one step. `prompt` is None where token ids came in; `outputs` holds all n completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
