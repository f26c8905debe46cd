"""One request of a workload, before it has tokens or an id."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestSpec:
    """What arrives when.

    arrived_at_s: seconds after the first request; of a later turn of a conversation, after the answer before it.
    text: the prompt, where the workload has it as text.
    block_ids: names of the prompt's blocks, block_tokens each; prompts that begin with the same names begin alike.
    conversation: requests of the same number are its turns, in order: each prompt begins with the prompt and the answer
        before it.
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
