"""What the core tells the front end: once when it has started, then a message a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sarathi.messages.memory import CacheCapacity, MemoryStats, PrefixCacheStats
from sarathi.messages.steps import PromptLogprobs, SampledToken, SchedulerOutput, StepResult


class RequestUpdate(NamedTuple):
    """What one step brought one request, as the core tells the front end.

    tokens: the new tokens, in order.
    finish_reason: "stop", "length" or "error" where the request ended in this step; None while it goes on.
    stop_reason: the stop token that ended it; None for the model's end token; what went wrong, for "error".
    prompt_logprobs: of the part of its prompt that the step computed, where the request asked for them.
    num_cached_tokens: of its prompt, which were found in the cache when it started.
    """

    request_id: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0


class StepReport(NamedTuple):
    """A completed step for the metrics; times are seconds of the core's clock."""

    out: SchedulerOutput
    result: StepResult
    started_at_s: float
    scheduled_at_s: float
    executed_at_s: float


class CoreOutput(NamedTuple):
    """The core's one message of a step.

    step: the step that completed, for the metrics; None where it is still running, and from a core in another process.
    first_scheduled: requests that were computed for the first time in that step, which was scheduled from
        scheduled_at_s on, by the core's clock.
    """

    updates: tuple[RequestUpdate, ...] = ()
    step: StepReport | None = None
    first_scheduled: tuple[str, ...] = ()
    scheduled_at_s: float = 0.0


class Resolution(NamedTuple):
    """What "auto" in the configuration became.

    backend: the attention backend's name. device, dtype: of weights and activations, as torch names them.
    dtype_eps: difference between 1 and the next larger number in dtype.
    prefix_caching: whether it is asked for and possible for this model, its ranks and the addresses of the device.
    mapped_weights: whether the memory of weights can be given back while their addresses stay.
    cascade_attention: whether it is asked for, prefixes are shared, and the backend has the kernel.
    """

    backend: str
    device: str
    dtype: str
    dtype_eps: float
    prefix_caching: bool = False
    mapped_weights: bool = False
    cascade_attention: bool = False


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the core tells the front end once, when it has started.

    vocab_size: token ids are in [0, vocab_size). max_model_len: tokens of the longest request, prompt and output.
    capacity: of the KV cache. token_bytes: of one token's keys and values in all layers.
    """

    vocab_size: int
    max_model_len: int
    capacity: CacheCapacity
    token_bytes: int
    resolution: Resolution

    @property
    def num_cache_tokens(self) -> int:
        """Tokens of one request that fill the whole cache."""
        return self.capacity.tokens_in(self.capacity.rows)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt that can run: an output token must follow, which need not be in the cache."""
        return min(self.max_model_len - 1, self.num_cache_tokens)


class CoreStats(NamedTuple):
    """A core between two steps. Rows are those of the block space manager."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    used_rows: int
    total_rows: int
    memory: MemoryStats
    prefixes: PrefixCacheStats
