"""Messages from the core to the front end: one after its start, then one per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sarathi.messages.memory import CacheCapacity, MemoryStats, PrefixCacheStats
from sarathi.messages.steps import PromptLogprobs, SampledToken, SchedulerOutput, StepResult


class RequestUpdate(NamedTuple):
    """One step's results for one request.

    tokens: the new tokens, in order.
    finish_reason: "stop", "length" or "error" if the request ended in this step; None while unfinished.
    stop_reason: the stop token that ended it; None for the model's end token; the error message for "error".
    prompt_logprobs: of the prompt tokens that the step computed, if requested.
    num_cached_tokens: prompt tokens found in the prefix cache when the request started.
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
    """The core's message for one step.

    step: the completed step, for the metrics; None if no step completed, and from a core in another process.
    first_scheduled: requests that this step computed for the first time.
    scheduled_at_s: when scheduling of the step began, on the core's clock.
    """

    updates: tuple[RequestUpdate, ...] = ()
    step: StepReport | None = None
    first_scheduled: tuple[str, ...] = ()
    scheduled_at_s: float = 0.0


class Resolution(NamedTuple):
    """The values that "auto" settings resolved to.

    backend: the attention backend's name. device, dtype: of weights and activations, as torch names them.
    dtype_eps: difference between 1 and the next larger number in dtype.
    prefix_caching: requested, and supported for this model, its ranks and the device's address space.
    mapped_weights: whether the weights' memory can be released while their addresses stay valid.
    cascade_attention: requested, prefix caching is on, and the backend has the kernel.
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
    """Sent once, after the core's start.
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
        """Tokens of one request that fills the whole cache."""
        return self.capacity.tokens_in(self.capacity.rows)

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt that can run. One output token must follow; it needs no memory in the cache."""
        return min(self.max_model_len - 1, self.num_cache_tokens)


class CoreStats(NamedTuple):
    """The core's state between two steps. Rows are those of the block space manager."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    used_rows: int
    total_rows: int
    memory: MemoryStats
    prefixes: PrefixCacheStats
