"""What a caller gets from each step: the state of a request and of its completions.

Nothing changes an output, but none is frozen: hundreds are built in a step, and frozen ones take three times as long.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, NamedTuple


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

    def to_dict(self) -> dict[str, Any]:
        """What it holds, as JSON values; `logprobs` only where asked for, and null where NaN or infinite."""
        answer: dict[str, Any] = {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.logprobs is not None:
            answer["logprobs"] = [_logprob_dicts(entry.items()) for entry in self.logprobs]
        return answer

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
    """A request as of one step. `prompt` is None where token ids came in; `outputs` holds all n completions. The prompt
    of a chat is its text in the model's own format.

    prompt_logprobs: one entry for each prompt token computed so far, None for the first; None unless asked for.
    num_cached_tokens: of the prompt, those whose keys and values were found in the cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; `prompt_logprobs` only where asked for."""
        shown: dict[str, Any] = {
            "request_id": self.request_id,
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
            "num_cached_tokens": self.num_cached_tokens,
            "outputs": [each.to_dict() for each in self.outputs],
            "finished": self.finished,
            "metrics": asdict(self.metrics),
        }
        if self.prompt_logprobs is not None:
            shown["prompt_logprobs"] = [_logprob_dicts((entry or {}).items()) for entry in self.prompt_logprobs]
        return shown


def _logprob_dicts(entries: Iterable[tuple[int, Logprob]]) -> list[dict[str, Any]]:
    """A logprob that is NaN or infinite is None: JSON has neither."""
    return [
        {"token_id": token_id, "token": each.decoded_token, "logprob": each.logprob if isfinite(each.logprob) else None}
        for token_id, each in entries
    ]
