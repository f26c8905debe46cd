"""How much of a prompt one step takes: chunks under a token budget, or the whole of it. Knows no queues."""

from __future__ import annotations

from typing import Protocol

from sarathi.core.scheduler.chunk_budget import ChunkBudget
from sarathi.core.scheduler.step import Step


class PromptRule(Protocol):
    """Cuts prompts into chunks. Running requests with a single token left, as decodes have, are not asked about."""

    @property
    def max_running(self) -> int | None:
        """Requests that may run at a time so that each gets a token in every step; None: any number."""

    def length(self, remaining: int, num_computed_tokens: int, step: Step, num_running: int) -> int:
        """Tokens to compute of a prompt's `remaining` ones in `step`; 0: none now."""

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Learn that a step of num_tokens took step_s seconds."""


class Chunks:
    """As much as the step's budget leaves, and no more than the cap for one request.

    A budget that has shrunk below the number of running requests still has one token for each of them: their decodes
    go on, and so does the oldest prompt.
    """

    def __init__(self, budget: ChunkBudget, max_per_request: int | None) -> None:
        self._budget = budget
        self._max_per_request = max_per_request

    @property
    def max_running(self) -> int | None:
        return self._budget.max_tokens

    def length(self, remaining: int, num_computed_tokens: int, step: Step, num_running: int) -> int:
        budget = max(self._budget.tokens(num_computed_tokens), num_running)
        return max(0, min(remaining, budget - step.num_tokens, self._max_per_request or remaining))

    def observe(self, num_tokens: int, step_s: float) -> None:
        self._budget.observe(num_tokens, step_s)


class WholePrompts:
    """All or nothing: as many prompts as fit in max_tokens, and any one prompt where none is in the step yet."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    @property
    def max_running(self) -> int | None:
        return None

    def length(self, remaining: int, num_computed_tokens: int, step: Step, num_running: int) -> int:
        taken = step.num_prompt_tokens
        return remaining if taken == 0 or taken + remaining <= self._max_tokens else 0

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Nothing to learn."""
