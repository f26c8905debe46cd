"""One request of a workload, before it has tokens or an id."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestSpec:
    """A request's arrival time and lengths.

    arrived_at_s: seconds after the first request; for a later turn of a conversation, after the previous answer.
    text: the prompt, if the workload has text.
    block_ids: ids of the prompt's blocks of block_tokens each; equal leading ids are a common prefix.
    conversation: requests with the same number are its turns, in order: each prompt begins with the previous prompt
        and answer.
    """

    arrived_at_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    text: str | None = None
    block_ids: tuple[int, ...] = ()
    block_tokens: int = 512
    conversation: int | None = None

    def __post_init__(self) -> None:
        if self.num_prefill_tokens < 1 or self.num_decode_tokens < 1:
            raise ValueError(
                f"a request of {self.num_prefill_tokens} prompt and {self.num_decode_tokens} output tokens: "
                "both must be at least 1"
            )

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decode_tokens
