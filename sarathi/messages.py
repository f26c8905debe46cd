"""Messages between front end, core and workers: immutable and serialisable, so that each may be a process.

A worker processes a SchedulerOutput in this order: release `preempted` and `finished`, add `new_requests` and every
chunk's `block_ids`, prepare memory, compute. Only the last two can run out of memory, so the bookkeeping before them is
valid even for a step whose result has `available_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import NamedTuple, Protocol

from sarathi.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request, from the front end to the core; and from the core to the workers, before its first chunk.

    A worker keeps the tokens and appends those that it samples.
    token_ids: the prompt.
    eos_token_ids: the model's end tokens, which are not sampled before sampling_params.min_tokens tokens.
    priority: the lower goes first, before all of a higher one whenever they arrived.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of one request, computed in one step.

    samples: whether the chunk ends at the request's last token, so that the next one is drawn from its logits.
    granted_tokens: length for which the request holds memory, in whole rows; the prompt's from admission on.
    block_ids: blocks granted since the request's last chunk, in order (all of them after a resume); () on vattn.

    A named tuple, not a dataclass: hundreds are built in every step, and it takes a third of the time.
    """

    request_id: str
    start: int
    num_tokens: int
    samples: bool
    granted_tokens: int
    block_ids: tuple[int, ...] = ()


EVERY_KEY = -1


class SharedPrefix(NamedTuple):
    """A new request that begins with the tokens of another sequence.

    source: a running request, or the key of a retained sequence.
    num_mapped: leading tokens whose memory both have from now on. num_tokens: those up to here are copied.
    source_block: block of the source that holds the copied tokens (paged); -1.
    """

    request_id: str
    source: str | int
    num_mapped: int
    num_tokens: int
    source_block: int = -1


class PrefixChanges(NamedTuple):
    """What a step changes in memory that outlives requests, in this order. On blocks only `shared` needs work.

    retained: (request id, key): keep the memory of this request as it is, under the key.
    evicted: (key, rows): keep the first rows of it, or release it where that is 0; EVERY_KEY: all keys.
    continued: (request id, key): a new request takes over what is kept under the key.
    shared: new requests that begin as other sequences do. Copies are made in the order of the steps.
    """

    retained: tuple[tuple[str, int], ...] = ()
    evicted: tuple[tuple[int, int], ...] = ()
    continued: tuple[tuple[str, int], ...] = ()
    shared: tuple[SharedPrefix, ...] = ()


NO_CHANGES = PrefixChanges()


class PrefixGroup(NamedTuple):
    """Requests of a step that decode and begin with the same num_tokens tokens, which attention may read once.

    members: the indices of their chunks. Any member's memory has these tokens.
    """

    num_tokens: int
    members: tuple[int, ...]


class Portion(NamedTuple):
    """Tokens [first, end) of a request, whose keys and values leave for another engine while a step computes them."""

    request_id: str
    first: int
    end: int


class Arrival(NamedTuple):
    """A request whose prompt another engine has computed, or has given up.

    num_portions: that were sent of it. token: the one behind its prompt; None where it has ended.
    """

    request_id: str
    num_portions: int
    token: SampledToken | None


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work. The order of chunks is the order of the batch.

    preempted: release the memory and keep the tokens, which are computed again later.
    finished: drop the request. Both are released before the memory of this step's chunks is prepared.
    received: prompts that another engine computes: memory is prepared for them as for chunks, and nothing is computed.
        They begin behind the tokens that are cached here.
    sent: what this step computes for another engine.
    num_recoveries: failed steps that the scheduler knew of. An executor that has seen more of them fails this step too:
        it was sent after a failed one, and depends on what that should have computed.
    prefix_groups: disjoint, those with the most in common first; none without cascade attention.
    """

    step_id: int
    new_requests: tuple[NewRequest, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    preempted: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    num_recoveries: int = 0
    prefixes: PrefixChanges = NO_CHANGES
    received: tuple[Chunk, ...] = ()
    sent: tuple[Portion, ...] = ()
    prefix_groups: tuple[PrefixGroup, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether workers need not hear of it."""
        changes = (self.new_requests, self.chunks, self.preempted, self.finished, self.received)
        return not any((*changes, *self.prefixes))

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all chunks."""
        return sum([chunk.num_tokens for chunk in self.chunks])


NOT_FINITE, NO_TOKEN_LEFT = -1, -2


class SampledToken(NamedTuple):
    """A token drawn for one request.

    token_id: NOT_FINITE where the model's logits were NaN or infinite; NO_TOKEN_LEFT where the request's parameters
        excluded every token. No token could be drawn in either case, and the request ends.
    logprob: natural logarithm of its probability; None unless asked for.
    top_logprobs: (token id, logprob) of the most likely tokens, best first.
    error: what a logits processor raised, in which case no token is left.
    """

    request_id: str
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None


class PromptLogprobs(NamedTuple):
    """Log probabilities of a request's prompt tokens from position `start` on, one entry a token, with their logprobs.

    After a preemption, positions come a second time.
    """

    request_id: str
    start: int
    tokens: tuple[SampledToken, ...]


class HostTimes(NamedTuple):
    """Seconds of a step on the CPU: to prepare its inputs, and to sample or read its tokens."""

    prepare_inputs_s: float
    sample_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step: one token for every chunk that samples, in any order.

    model_s: seconds that the step took on the device.
    available_rows: set if the cache had less memory than the block space manager counts on: nothing was computed,
        `tokens` is empty, and the cache has this many rows in total from now on.
    host: None where nothing was computed.
    """

    step_id: int
    tokens: tuple[SampledToken, ...] = ()
    model_s: float = 0.0
    available_rows: int | None = None
    host: HostTimes | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class StepFuture(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait until the step has ended. May be called again."""


class CompletedStep(NamedTuple):
    """The future of a step that ended before its launch returned."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome


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


class PrefixCacheStats(NamedTuple):
    """Tokens and rows since the start. queried: tokens of requests that started; hit: those found in the cache.

    num_retained, num_retained_rows: sequences of ended requests now, and the rows that only they hold.
    """

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_mapped_tokens: int = 0
    num_copied_tokens: int = 0
    num_evicted_rows: int = 0
    num_retained: int = 0
    num_retained_rows: int = 0


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


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """The size of the cache in rows, the unit of the block space manager.

    Virtual memory: a row is one page in every region, token_bytes is one token's share of one region.
    Paged: a row is a block, token_bytes is 1 and page_bytes is the tokens of a block.
    over_read_tokens: kernels may read so many tokens past a request's last one, so that it needs memory there too.
    num_retained: sequences of ended requests that may be kept; 0: no prefix caching.
    share_rows: sequences share multiples of so many rows, and retained ones are shortened to such; they hold whole
        tokens.
    """

    rows: int
    token_bytes: int
    page_bytes: int
    over_read_tokens: int = 0
    num_retained: int = 0
    share_rows: int = 1

    def rows_for(self, num_tokens: int) -> int:
        """Rows that num_tokens of one request take."""
        mapped_tokens = num_tokens + self.over_read_tokens if num_tokens else 0
        return -(-mapped_tokens * self.token_bytes // self.page_bytes)

    def tokens_in(self, rows: int) -> int:
        """Tokens of one request that fit in rows: the largest n with rows_for(n) <= rows."""
        return max(0, self.tokens_within(rows) - self.over_read_tokens)

    def tokens_within(self, rows: int) -> int:
        """Tokens whose memory lies within the first rows of a request."""
        return rows * self.page_bytes // self.token_bytes

    def rows_holding(self, num_tokens: int) -> int:
        """Rows that hold the first num_tokens tokens of a request, in whole shares."""
        return self.whole_shares(-(-num_tokens * self.token_bytes // self.page_bytes))

    def whole_shares(self, rows: int) -> int:
        """The least multiple of share_rows that is at least `rows`."""
        return -(-rows // self.share_rows) * self.share_rows

    def shareable(self, num_tokens: int) -> tuple[int, int]:
        """The most rows that hold nothing but the first num_tokens tokens, and how many of these."""
        rows = num_tokens * self.token_bytes // (self.share_rows * self.page_bytes) * self.share_rows
        return rows, self.tokens_within(rows)


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """The cache's memory in bytes, over all layers, and the cost of managing it so far.

    reserved: addresses. created: physical memory held. mapped: the part of it at some address. idle: mapped for no
    request now, retained for prompts that begin alike or not; given as soon as a request needs it. wasted: mapped for a
    request but past its last token. steps_waited: steps that had to wait for a page.
    """

    reserved_bytes: int = 0
    created_bytes: int = 0
    mapped_bytes: int = 0
    idle_bytes: int = 0
    wasted_bytes: int = 0
    peak_mapped_bytes: int = 0
    driver_calls: int = 0
    driver_s: float = 0.0
    steps_waited: int = 0

    @classmethod
    def sum_of(cls, parts: Iterable[MemoryStats]) -> MemoryStats:
        """The memory of several caches together."""
        each = [astuple(part) for part in parts]
        return cls(*[sum(values) for values in zip(*each, strict=True)])


class CoreStats(NamedTuple):
    """A core between two steps. Rows are those of the block space manager."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    used_rows: int
    total_rows: int
    memory: MemoryStats
    prefixes: PrefixCacheStats
