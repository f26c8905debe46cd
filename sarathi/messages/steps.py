"""The messages of a step between scheduler and workers: its work and its result.

A worker processes a SchedulerOutput in this order: release `preempted` and `finished`, add `new_requests` and every
chunk's `block_ids`, prepare memory, compute. Only the last two can run out of memory, so the first two stay in effect
even if the result has `available_rows`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sarathi.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request. The front end sends it to the core, which sends it to the workers before its first chunk.

    Workers keep the tokens and append those that they sample.
    token_ids: the prompt, int64 (typecode q).
    eos_token_ids: the model's end tokens, which are not sampled before sampling_params.min_tokens tokens.
    priority: lower values run first, whatever their arrival times.
    """

    request_id: str
    token_ids: array  # type: ignore[type-arg] # msgspec evaluates it: array[int] needs Python 3.12
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of one request, computed in one step.

    samples: whether the chunk ends at the request's last token, so that the next token is sampled from its logits.
    granted_tokens: tokens for which the request has memory, in whole rows; at least the prompt's from admission on.
    block_ids: blocks allocated since the request's last chunk, in order (all of them after a resume); () on vattn.

    A named tuple, since every step builds hundreds, and a dataclass takes three times as long.
    """

    request_id: str
    start: int
    num_tokens: int
    samples: bool
    granted_tokens: int
    block_ids: tuple[int, ...] = ()


EVERY_KEY = -1


class SharedPrefix(NamedTuple):
    """A new request whose first tokens equal those of another sequence.

    source: a running request, or the key of a retained sequence.
    num_mapped: leading tokens whose memory both share. Tokens [num_mapped, num_tokens) are copied.
    source_block: the source's block that contains the copied tokens (paged); else -1.
    """

    request_id: str
    source: str | int
    num_mapped: int
    num_tokens: int
    source_block: int = -1


class PrefixChanges(NamedTuple):
    """A step's changes to the prefix cache, in this order. Paged caches need work only for `shared`.

    retained: (request id, key): retain the request's memory under this key.
    evicted: (key, rows): truncate the sequence to its first rows, or release it if rows is 0; EVERY_KEY: all keys.
    continued: (request id, key): a new request takes over the memory retained under this key.
    shared: new requests that share prefixes with other sequences. Copies run in the order of the steps.
    """

    retained: tuple[tuple[str, int], ...] = ()
    evicted: tuple[tuple[int, int], ...] = ()
    continued: tuple[tuple[str, int], ...] = ()
    shared: tuple[SharedPrefix, ...] = ()


NO_CHANGES = PrefixChanges()


class PrefixGroup(NamedTuple):
    """Decoding requests of a step that share their first num_tokens tokens, which attention may read only once.

    members: the indices of their chunks. Every member's memory contains these tokens.
    """

    num_tokens: int
    members: tuple[int, ...]


class Portion(NamedTuple):
    """Tokens [first, end) of a request whose keys and values a step sends to the decode engine while computing them."""

    request_id: str
    first: int
    end: int


class Arrival(NamedTuple):
    """A request whose prompt the prefill engine has computed or abandoned.

    num_portions: portions sent. token: the first output token; None if the request has ended.
    """

    request_id: str
    num_portions: int
    token: SampledToken | None


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work. The order of chunks is the order of the batch.

    preempted: requests to release, keeping their tokens, which are recomputed later.
    finished: requests to drop. Both are released before the memory of this step's chunks is prepared.
    received: prompts that the prefill engine computes. Memory is prepared for them as for chunks, but nothing is
        computed. They start after the tokens that are cached here.
    sent: portions to send to the decode engine.
    num_recoveries: failed steps known to the scheduler. An executor that has seen more of them fails this step too,
        since it depends on the result of a failed step.
    prefix_groups: disjoint, longest common prefix first; empty without cascade attention.
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
        """Whether there is nothing to send to the workers."""
        changes = (self.new_requests, self.chunks, self.preempted, self.finished, self.received)
        return not any((*changes, *self.prefixes))

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all chunks."""
        return sum([chunk.num_tokens for chunk in self.chunks])


NOT_FINITE, NO_TOKEN_LEFT = -1, -2


class SampledToken(NamedTuple):
    """A token sampled for one request.

    token_id: NOT_FINITE if the logits were NaN or infinite; NO_TOKEN_LEFT if the request's parameters excluded every
        token. In both cases no token was sampled, and the request ends.
    logprob: natural logarithm of its probability; None unless requested.
    top_logprobs: (token id, logprob) of the most likely tokens, best first.
    error: the error that a logits processor raised; token_id is then NO_TOKEN_LEFT.
    """

    request_id: str
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None


class PromptLogprobs(NamedTuple):
    """Log probabilities of a request's prompt tokens from position `start` on, one entry per token.

    After a preemption, positions are sent again.
    """

    request_id: str
    start: int
    tokens: tuple[SampledToken, ...]


class HostTimes(NamedTuple):
    """CPU seconds of a step: to prepare its inputs, and to sample or read its tokens."""

    prepare_inputs_s: float
    sample_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step: one token for every chunk that samples, in any order.

    model_s: seconds that the step took on the device.
    available_rows: set if the cache had less memory than the block space manager assumed. Nothing was computed,
        `tokens` is empty, and from now on the cache has this many rows in total.
    host: None if nothing was computed.
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
        """Wait until the step has ended. Idempotent."""


class CompletedStep(NamedTuple):
    """The future of a step that completed before its launch returned."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome
