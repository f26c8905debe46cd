"""How many tokens a step may hold: fixed, by a schedule, or learned from the clock's answers. Knows no queues."""

from __future__ import annotations

from typing import Protocol

from sarathi.config.schema import SchedulerConfig


class ChunkBudget(Protocol):
    """The token budget of a step."""

    @property
    def max_tokens(self) -> int:
        """No budget is larger than this."""

    def tokens(self, num_computed_tokens: int) -> int:
        """Tokens of a step that goes on with a prompt of which num_computed_tokens are done."""

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Learn that a step of num_tokens took step_s seconds."""


class FixedBudget:
    """The same for every step."""

    def __init__(self, chunk_size: int) -> None:
        self.max_tokens = chunk_size

    def tokens(self, num_computed_tokens: int) -> int:
        return self.max_tokens

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Nothing to learn."""


class ScheduledBudget:
    """From `high` down to `low` in equal stages over the first max_tokens of a prompt.

    A late chunk attends to more than an early one of the same size; smaller late chunks keep the steps equally long.
    """

    def __init__(self, high: int, low: int, prompt_tokens: int, num_stages: int) -> None:
        self.max_tokens = high
        self._tokens_per_stage = -(-prompt_tokens // num_stages)
        self._sizes = [high - (high - low) * stage // max(1, num_stages - 1) for stage in range(num_stages)]

    def tokens(self, num_computed_tokens: int) -> int:
        return self._sizes[min(num_computed_tokens // self._tokens_per_stage, len(self._sizes) - 1)]

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Nothing to learn."""


class LatencyBudget:
    """Follows the times of steps to keep them at target_step_s, between `low` and `high` tokens.

    The time of a step grows with its tokens, by a law that differs from model to model and changes with the length of
    the contexts beside it. So no law is fitted: each full step scales the budget by target over time, at once
    downwards and with a quarter of the correction upwards, which settles just below the target where times are noisy.
    Steps that were not full say nothing about a larger budget.
    """

    _GROWTH_GAIN = 0.25
    _FULL = 0.9

    def __init__(self, low: int, high: int, target_step_s: float) -> None:
        self.max_tokens = high
        self._low = low
        self._target_step_s = target_step_s
        self._tokens = float(low)

    def tokens(self, num_computed_tokens: int) -> int:
        return int(self._tokens)

    def observe(self, num_tokens: int, step_s: float) -> None:
        if step_s <= 0.0:
            return
        correction = self._target_step_s / step_s - 1.0
        if correction > 0.0 and num_tokens < self._FULL * int(self._tokens):
            return
        gain = self._GROWTH_GAIN if correction > 0.0 else 1.0
        scaled = self._tokens * (1.0 + gain * min(correction, 1.0))
        self._tokens = min(max(scaled, self._low), self.max_tokens)


def make_chunk_budget(config: SchedulerConfig) -> ChunkBudget:
    """The budget that a configuration asks for."""
    knobs = config.chunk_budget
    if knobs.policy == "schedule":
        return ScheduledBudget(
            knobs.high_chunk_size, knobs.low_chunk_size, knobs.chunk_schedule_max_tokens, knobs.chunk_schedule_stages
        )
    if knobs.policy == "latency":
        return LatencyBudget(knobs.low_chunk_size, knobs.high_chunk_size, knobs.target_step_s)
    return FixedBudget(config.chunk_size)
