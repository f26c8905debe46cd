"""How many tokens of a prompt one step computes: chunks under a token budget, or the whole prompt."""

from __future__ import annotations

from typing import Protocol

from sarathi.config.schema import SchedulerConfig
from sarathi.core.scheduler.request_state import Step
from sarathi.request import Request


class PrefillPolicy(Protocol):
    """Cuts prompts into chunks. It is not asked about running requests with one token left, such as decodes."""

    @property
    def max_running(self) -> int | None:
        """Requests that may run at a time so that each gets a token in every step; None: any number."""

    def chunk_length(self, request: Request, step: Step, num_running: int) -> int:
        """Tokens of a request to compute in `step`, of the ones that remain; 0: none in this step."""

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Record that a step of num_tokens took step_s seconds."""


class FullPrefill:
    """Whole prompts only: as many as fit in max_batched_tokens, and any one prompt if the step has none yet.

    If max_batched_tokens is not set, the longest sequence, max_model_len tokens, is the limit.
    """

    max_running = None

    def __init__(self, config: SchedulerConfig, max_model_len: int) -> None:
        self._max_tokens = config.max_batched_tokens or max_model_len

    def chunk_length(self, request: Request, step: Step, num_running: int) -> int:
        taken, remaining = step.num_prompt_tokens, request.num_remaining_tokens
        return remaining if taken == 0 or taken + remaining <= self._max_tokens else 0

    def observe(self, num_tokens: int, step_s: float) -> None:
        """The limit is fixed."""


class ChunkedPrefill:
    """What the step's token budget leaves, up to the limit for one request.

    If the budget has fallen below the number of running requests, each still gets one token, so all decodes and the
    oldest prompt make progress.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._budget = make_chunk_budget(config)
        self._max_per_request = config.max_chunk_per_request

    @property
    def max_running(self) -> int | None:
        return self._budget.max_tokens

    def chunk_length(self, request: Request, step: Step, num_running: int) -> int:
        budget = max(self._budget.tokens(request.num_computed_tokens), num_running)
        remaining = request.num_remaining_tokens
        return max(0, min(remaining, budget - step.num_tokens, self._max_per_request or remaining))

    def observe(self, num_tokens: int, step_s: float) -> None:
        self._budget.observe(num_tokens, step_s)


class ChunkBudget(Protocol):
    """The token budget of a step."""

    @property
    def max_tokens(self) -> int:
        """Upper bound of every budget."""

    def tokens(self, num_computed: int) -> int:
        """Budget of a step that continues a prompt of which num_computed tokens are computed."""

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Record that a step of num_tokens took step_s seconds."""


class FixedBudget:
    """The same budget for every step."""

    def __init__(self, chunk_size: int) -> None:
        self.max_tokens = chunk_size

    def tokens(self, num_computed: int) -> int:
        return self.max_tokens

    def observe(self, num_tokens: int, step_s: float) -> None:
        """The budget is fixed."""


class ScheduledBudget(FixedBudget):
    """Decreases from `high` to `low` in equal stages over the first prompt_tokens tokens of a prompt.

    A late chunk attends to more tokens than an early one of the same size; smaller late chunks keep step times equal.
    """

    def __init__(self, high: int, low: int, prompt_tokens: int, num_stages: int) -> None:
        super().__init__(high)
        self._tokens_per_stage = -(-prompt_tokens // num_stages)
        self._sizes = [high - (high - low) * stage // max(1, num_stages - 1) for stage in range(num_stages)]

    def tokens(self, num_computed: int) -> int:
        return self._sizes[min(num_computed // self._tokens_per_stage, len(self._sizes) - 1)]


class LatencyBudget:
    """Adjusts the budget between `low` and `high` tokens so that steps take target_step_s seconds.

    The relation between tokens and step time differs between models and changes with the context lengths in the batch,
    so no model of it is fitted. Each full step scales the budget by target / measured time: the whole correction
    downwards, a quarter of it upwards, which settles just below the target when times are noisy. Steps that were not
    full give no evidence for a larger budget.
    """

    _GROWTH_GAIN = 0.25
    _FULL = 0.9

    def __init__(self, low: int, high: int, target_step_s: float) -> None:
        self.max_tokens = high
        self._low = low
        self._target_step_s = target_step_s
        self._tokens = float(low)

    def tokens(self, num_computed: int) -> int:
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
    """The budget that config.chunk_budget.policy names."""
    budget = config.chunk_budget
    low, high = budget.low_chunk_size, budget.high_chunk_size
    if budget.policy == "schedule":
        return ScheduledBudget(high, low, budget.chunk_schedule_max_tokens, budget.chunk_schedule_stages)
    if budget.policy == "latency":
        return LatencyBudget(low, high, budget.target_step_s)
    return FixedBudget(config.chunk_size)
