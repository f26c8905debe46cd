"""How many tokens of a prompt one step computes: chunks under a token budget, or the whole prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod

from sarathi.config.schema import SchedulerConfig
from sarathi.core.scheduler.request_state import Step
from sarathi.request import Request


class PrefillPolicy(ABC):
    """Cuts prompts into chunks. It is not asked about running requests with one token left, such as decodes.

    max_running: requests that may run at a time so that each gets a token in every step; None: any number.
    """

    max_running: int | None = None

    @abstractmethod
    def chunk_length(self, request: Request, step: Step, num_running: int) -> int:
        """Tokens of a request to compute in `step`, of the ones that remain; 0: none in this step."""

    def observe(self, num_tokens: int, step_s: float) -> None:  # noqa: B027
        """Record that a step of num_tokens took step_s seconds. Ignored where chunks do not depend on it."""


class FullPrefill(PrefillPolicy):
    """Whole prompts only: as many as fit in max_batched_tokens, and any one prompt if the step has none yet.

    If max_batched_tokens is not set, the longest sequence, max_model_len tokens, is the limit.
    """

    def __init__(self, config: SchedulerConfig, max_model_len: int) -> None:
        self._max_tokens = config.max_batched_tokens or max_model_len

    def chunk_length(self, request: Request, step: Step, num_running: int) -> int:
        taken, remaining = step.num_prompt_tokens, request.num_remaining_tokens
        return remaining if taken == 0 or taken + remaining <= self._max_tokens else 0


class ChunkedPrefill(PrefillPolicy):
    """What the step's token budget leaves, up to the limit for one request. The budget is the same for every step.

    Without rolling_prefills a step has chunks of one prompt only.

    If the budget has fallen below the number of running requests, each still gets one token, so all decodes and the
    oldest prompt make progress.
    """

    def __init__(self, config: SchedulerConfig, max_budget: int) -> None:
        """max_budget: upper bound of every budget, tokens."""
        self.max_running = self._max_budget = max_budget
        self._max_per_request = config.max_chunk_per_request
        self._rolling = config.rolling_prefills

    def budget(self, num_computed: int) -> int:
        """Token budget of a step that continues a prompt of which num_computed tokens are computed."""
        return self._max_budget

    def chunk_length(self, request: Request, step: Step, num_running: int) -> int:
        if step.num_prompt_tokens and not self._rolling:
            return 0
        budget = max(self.budget(request.num_computed_tokens), num_running)
        remaining = request.num_remaining_tokens
        return max(0, min(remaining, budget - step.num_tokens, self._max_per_request or remaining))


class ScheduledPrefill(ChunkedPrefill):
    """The budget decreases from high to low_chunk_size in equal stages over the first tokens of a prompt.

    A late chunk attends to more tokens than an early one of the same size; smaller late chunks keep step times equal.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        knobs = config.chunk_budget
        high, low, num_stages = knobs.high_chunk_size, knobs.low_chunk_size, knobs.chunk_schedule_stages
        super().__init__(config, high)
        self._tokens_per_stage = -(-knobs.chunk_schedule_max_tokens // num_stages)
        self._sizes = [high - (high - low) * stage // max(1, num_stages - 1) for stage in range(num_stages)]

    def budget(self, num_computed: int) -> int:
        return self._sizes[min(num_computed // self._tokens_per_stage, len(self._sizes) - 1)]


class LatencyPrefill(ChunkedPrefill):
    """Adjusts the budget between low and high_chunk_size so that steps take target_step_s seconds.

    The relation between tokens and step time differs between models and changes with the context lengths in the batch,
    so no model of it is fitted. Each full step scales the budget by target / measured time: the whole correction
    downwards, a quarter of it upwards, which settles just below the target when times are noisy. Steps that were not
    full give no evidence for a larger budget.
    """

    _GROWTH_GAIN = 0.25
    _FULL = 0.9

    def __init__(self, config: SchedulerConfig) -> None:
        knobs = config.chunk_budget
        super().__init__(config, knobs.high_chunk_size)
        self._min_budget, self._target_step_s = knobs.low_chunk_size, knobs.target_step_s
        self._tokens = float(self._min_budget)

    def budget(self, num_computed: int) -> int:
        return int(self._tokens)

    def observe(self, num_tokens: int, step_s: float) -> None:
        if step_s <= 0.0:
            return
        correction = self._target_step_s / step_s - 1.0
        if correction > 0.0 and num_tokens < self._FULL * int(self._tokens):
            return
        gain = self._GROWTH_GAIN if correction > 0.0 else 1.0
        scaled = self._tokens * (1.0 + gain * min(correction, 1.0))
        self._tokens = min(max(scaled, self._min_budget), self._max_budget)


def make_chunked_prefill(config: SchedulerConfig) -> ChunkedPrefill:
    """Chunks under the budget that config.chunk_budget.policy names."""
    if config.chunk_budget.policy == "schedule":
        return ScheduledPrefill(config)
    if config.chunk_budget.policy == "latency":
        return LatencyPrefill(config)
    return ChunkedPrefill(config, config.chunk_size)
