r"""One request: its tokens and one counter of progress. Memory and times are kept elsewhere.

Prefill and decode are not phases: num_computed_tokens catches up with num_tokens, in chunks of any size.

    prompt_token_ids          output_token_ids   pending
    |------------------------|------------------|-------|   num_tokens
    |=================|                                     num_computed_tokens
                       \---- num_remaining_tokens ----/
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from sarathi.sampling_params import SamplingParams


class RequestStatus(Enum):
    """Where a request stands: only RUNNING holds memory, and only FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """A prompt on its way to a completion; compared by identity.

    priority: the lower goes first.
    eos_token_ids: the model's own end tokens, which sampling_params.ignore_eos switches off.
    num_computed_tokens: tokens whose K and V are in the cache, or will be once the steps in flight are done.
    num_pending_tokens: tokens being sampled by steps in flight, of which only the count is known.
    finish_reason: "stop", "length", "abort" or "error"; None until finished.
    stop_reason: the stop token or stop string that ended it; None for the model's end token.

    Raises ValueError where the prompt is empty: there is nothing to compute the first token from.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_preemptions: int = 0
    _token_array: array[int] = field(default_factory=lambda: array("i"), repr=False)

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.prompt_token_ids)
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id!r}: the prompt is empty; it must hold at least one token")

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens whose value is known."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        """Prompt and output so far, without pending tokens."""
        return self.prompt_token_ids + tuple(self.output_token_ids)

    def token_array(self) -> array[int]:
        """The same as 4-byte integers, which compare fast. It grows with the request; the caller must not change it."""
        if not self._token_array:
            self._token_array = array("i", self.prompt_token_ids)  # takes a quarter of the time of extend()
        tokens = self._token_array
        tokens.extend(self.output_token_ids[len(tokens) - len(self.prompt_token_ids) :])
        return tokens

    def end(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Mark the request finished, also while steps with it are in flight."""
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.num_pending_tokens = 0
