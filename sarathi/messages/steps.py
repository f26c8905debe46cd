"""A step's messages between scheduler and workers: the work, and its result.

A worker processes a SchedulerOutput in this order: release `preempted` and `finished`, add `new_requests` and every
chunk's `block_ids`, prepare memory, compute. Only the last two can run out of memory, so the bookkeeping before them is
valid even for a step whose result has `available_rows`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sarathi.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request, from the front end to the core; and from the core to the workers, before its first chunk.

    A worker keeps the tokens and appends those that it samples.
    token_ids: the prompt, int64 (typecode q).
    eos_token_ids: the model's end tokens, which are not sampled before sampling_params.min_tokens tokens.
    priority: the lower goes first, before all of a higher one whenever they arrived.
    """

    request_id: str
    token_ids: array  # type: ignore[type-arg] # msgspec evaluates it: array[int] needs Python 3.12
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
