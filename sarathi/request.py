r"""One request: its tokens and one counter of progress. Memory and times are kept elsewhere.

Prefill and decode are not phases: num_computed_tokens catches up with num_tokens, in chunks of any size.

    token_ids: prompt         output             pending
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
    """The state of a request. Only a RUNNING request has memory."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and its output so far; compared by identity.

    token_ids: int64 (typecode q), the prompt and the output so far. The request keeps a copy of what it is given.
    priority: lower values run first.
    eos_token_ids: the model's own end tokens, which sampling_params.ignore_eos switches off.
    num_computed_tokens: tokens whose K and V are in the cache, or will be after the steps in flight.
    num_pending_tokens: tokens that steps in flight are sampling; their values are not known yet.
    finish_reason: "stop", "length", "abort" or "error"; None until finished.
    stop_reason: the stop token or stop string that ended it; None for the model's end token.

    Raises ValueError for an empty prompt.
    """

    request_id: str
    token_ids: array[int]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_preemptions: int = 0
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = array("q", self.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        if not self.token_ids:
            raise ValueError(f"request {self.request_id!r}: the prompt is empty; it must hold at least one token")

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def num_output_tokens(self) -> int:
        """Output tokens whose value is known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def end(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Mark the request as finished, even while steps in flight contain it."""
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.num_pending_tokens = 0
