"""The outputs that callers receive from each step.

Outputs are never modified, but not frozen: a step builds hundreds, and frozen dataclasses take three times as long.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """Natural logarithm of a token's probability, and the token's text."""

    logprob: float
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Token id -> Logprob: the chosen token first, then the most likely ones, best first."""


@dataclass(repr=False, eq=False, slots=True)
class CompletionOutput:
    """One of a request's n completions after one step. It shares append-only lists instead of copying them.

    text: so far, without stop string and special tokens. It lags behind the tokens while a stop string may be matching.
    delta: text added by this step.
    finish_reason: "stop", "length", "abort" or "error"; None while unfinished.
    stop_reason: the stop string or stop token that ended it; None for the model's end token, or without a stop.
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
        """Token ids so far, including the one that ended the completion."""
        return self._token_ids[: self.num_tokens]

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """One entry per token; None unless requested."""
        return self._logprobs[: self.num_tokens] or None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; includes `logprobs` only if requested; NaN and infinite values become null."""
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
    """Times on the engine's clock, in seconds; None before the event. Shared by all outputs of a request."""

    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finish_time_s: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request after one step. `outputs` has all n completions.

    prompt: its text, in the model's chat format for a chat; None if token ids were given.
    prompt_logprobs: one entry per prompt token computed so far, None for the first one; None unless requested.
    num_cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
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
        """As JSON values; includes `prompt_logprobs` only if requested."""
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
    """NaN and infinite logprobs become None, since JSON has neither."""
    return [
        {"token_id": token_id, "token": each.decoded_token, "logprob": each.logprob if isfinite(each.logprob) else None}
        for token_id, each in entries
    ]
