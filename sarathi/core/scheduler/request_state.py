"""The requests of a scheduler: the state of each, the queue of those that wait, those that run, and a step's batch."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sarathi.core.block_space_manager.base import BlockSpaceManager
from sarathi.messages import (
    NO_CHANGES,
    NO_TOKEN_LEFT,
    NOT_FINITE,
    Chunk,
    NewRequest,
    PrefixChanges,
    PrefixGroup,
    RequestUpdate,
    SampledToken,
    SchedulerOutput,
    StepResult,
)
from sarathi.request import Request

_MESSAGES = {
    NOT_FINITE: "the model's logits are not finite (NaN or infinite): weights or dtype do not fit this input",
    NO_TOKEN_LEFT: "no token can be chosen: structured_outputs, allowed_token_ids, bad_words, min_tokens and "
    "logits_processors together exclude every one, or a logits processor returned NaN or infinity",
}
_new = tuple.__new__  # of a named tuple, in half the time of its class: a step has hundreds


@dataclass(eq=False, slots=True)
class RequestState:
    """What a scheduler records about a request beyond the request itself.

    arrival: position in the order of priority, then of arrival; lower goes first.
    max_output_tokens: output length at which the request ends.
    stop_token_ids: tokens that may end it, including the model's end tokens unless ignore_eos is set.
    granted_tokens: length for which it holds memory.
    steps_in_flight: steps scheduled with it and not yet updated; its memory is in use until they are.
    last_step_id: the last step that contains it or has to leave it out.
    is_known: whether the worker has been told about it.
    is_receiving: whether another engine computes its prompt now; it counts as one more step in flight. is_local:
        whether it has done so, or need not: what is missing of the request is computed here.
    num_cached_tokens: of its prompt, when it last started. num_deferred: steps for which it waited for another request
        to compute what both begin with.
    """

    request: Request
    arrival: int
    max_output_tokens: int
    stop_token_ids: frozenset[int] = field(init=False)
    granted_tokens: int = 0
    steps_in_flight: int = 0
    last_step_id: int = -1
    is_known: bool = False
    is_receiving: bool = False
    is_local: bool = False
    num_cached_tokens: int = 0
    num_deferred: int = 0

    def __post_init__(self) -> None:
        params = self.request.sampling_params
        ends = frozenset() if params.ignore_eos else self.request.eos_token_ids
        self.stop_token_ids = ends.union(params.stop_token_ids)

    def append(self, token: SampledToken) -> RequestUpdate:
        """Append an output token that was pending, and decide whether the request ends with it."""
        request, token_id = self.request, token.token_id
        request.num_pending_tokens -= 1
        if token_id < 0:
            return RequestUpdate(request.request_id, (), "error", token.error or _MESSAGES[token_id])
        request.token_ids.append(token_id)
        num_output = len(request.token_ids) - request.num_prompt_tokens
        reason, stop_reason = "length" if num_output >= self.max_output_tokens else None, None
        if token_id in self.stop_token_ids and num_output > request.sampling_params.min_tokens:
            is_eos = token_id in request.eos_token_ids and not request.sampling_params.ignore_eos
            reason, stop_reason = "stop", None if is_eos else token_id
        return _new(RequestUpdate, (request.request_id, (token,), reason, stop_reason, None, self.num_cached_tokens))


@dataclass(slots=True)
class Step:
    """The batch of one step, kept until its result arrives.

    num_prompt_tokens: tokens of chunks longer than one. num_partial: chunks that do not reach the end of their prompt.
    is_starved: memory ran out and no request could be preempted at once. is_void: rolled back; its result is ignored.
    finished: ids of ended requests that it announces to the worker. num_used_rows: rows in use by all requests.
    prefilled: requests of which it computes tokens, decodes apart.
    received, receiving: prompts that another engine computes from this step on, and their requests.
    started: requests that it starts with tokens from the cache, or from another engine.
    withdrawn: ids of those that a failed step started.
    """

    step_id: int
    chunks: list[Chunk] = field(default_factory=list)
    states: list[RequestState] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    preempted: list[RequestState] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_partial: int = 0
    is_starved: bool = False
    is_void: bool = False
    finished: tuple[str, ...] = ()
    num_used_rows: int = 0
    prefilled: list[Request] = field(default_factory=list)
    started: list[RequestState] = field(default_factory=list)
    withdrawn: tuple[str, ...] = ()
    prefixes: PrefixChanges = NO_CHANGES
    prefix_groups: tuple[PrefixGroup, ...] = ()
    received: list[Chunk] = field(default_factory=list)
    receiving: list[RequestState] = field(default_factory=list)

    def add(self, state: RequestState, length: int, samples: bool, block_ids: tuple[int, ...]) -> None:
        """Add the next `length` tokens of a request, which count as computed from now on."""
        request = state.request
        start = request.num_computed_tokens
        self.chunks.append(_new(Chunk, (request.request_id, start, length, samples, state.granted_tokens, block_ids)))
        self.states.append(state)
        self.num_tokens += length
        if length > 1:
            self.num_prompt_tokens += length
        request.num_computed_tokens = start + length
        if samples:
            request.num_pending_tokens += 1
        else:
            self.num_partial += 1
        state.steps_in_flight += 1
        state.last_step_id = self.step_id

    def receive(self, state: RequestState, block_ids: tuple[int, ...]) -> None:
        """Add a request whose prompt another engine computes from now on, with the token behind it. What is cached of
        it here need not be sent."""
        request = state.request
        start, length = request.num_computed_tokens, request.num_tokens
        chunk = Chunk(request.request_id, start, length - start, False, state.granted_tokens, block_ids)
        self.received.append(chunk)
        self.started.append(state)
        self.receiving.append(state)
        request.num_computed_tokens, request.num_pending_tokens = length, 1
        state.steps_in_flight += 1
        state.is_receiving = True

    def introduce(self, state: RequestState) -> None:
        """Tell the worker about a request, unless it knows it."""
        if not state.is_known:
            request = state.request
            new = NewRequest(request.request_id, request.token_ids[:], request.sampling_params, request.eos_token_ids)
            self.new_requests.append(new)
            state.is_known = True

    def tokens_by_request(self, result: StepResult) -> dict[str, SampledToken]:
        """The tokens of this step's result; ValueError unless there is one for each chunk that samples."""
        num_samples = len(self.chunks) - self.num_partial
        if len(result.tokens) != num_samples:
            raise ValueError(f"step {self.step_id} has {len(result.tokens)} tokens for {num_samples} that were due")
        return {token.request_id: token for token in result.tokens}

    def roll_back(self) -> None:
        """Undo the progress of all chunks. Several steps are rolled back newest first."""
        self.is_void = True
        for state, chunk in zip(self.states, self.chunks, strict=True):
            state.request.num_computed_tokens = chunk.start
            if not state.request.is_finished:
                state.request.num_pending_tokens -= chunk.samples
        for state in self.receiving:
            state.is_receiving, state.request.num_pending_tokens = False, 0

    def output(self, num_recoveries: int) -> SchedulerOutput:
        """The message to the worker."""
        preempted = (*self.withdrawn, *[state.request.request_id for state in self.preempted])
        new, chunks, received = tuple(self.new_requests), tuple(self.chunks), tuple(self.received)
        return SchedulerOutput(
            self.step_id, new, chunks, preempted, self.finished, num_recoveries, self.prefixes, received,
            prefix_groups=self.prefix_groups,
        )  # fmt: skip


class WaitingQueue:
    """New and preempted requests in order of arrival: a preempted request comes before all that arrived later."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, RequestState]] = []
        self._num_ended = 0

    def push(self, state: RequestState) -> None:
        heapq.heappush(self._heap, (state.arrival, state))

    def first(self) -> RequestState | None:
        """The oldest request that has not ended; ended ones before it are removed."""
        while self._heap and self._heap[0][1].request.is_finished:
            heapq.heappop(self._heap)
            self._num_ended -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Remove the request that first() returned."""
        heapq.heappop(self._heap)

    def note_ended(self) -> None:
        """Count a waiting request that has ended; once more than half have, remove them: amortized O(1) each."""
        self._num_ended += 1
        if 2 * self._num_ended > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].request.is_finished]
            heapq.heapify(self._heap)
            self._num_ended = 0


class RunningRequests:
    """The requests that hold memory.

    running: in order of arrival. finishing: ended requests whose last step is in flight, by id; their memory is in use
    until its result arrives. finished_ids: ended requests that the worker has yet to be told about.
    num_micro_batches: steps in flight of a pipeline, which divide the decodes. A step has at most this share of them,
    and a decode waits for the value of the token before.
    """

    def __init__(self, block_space_manager: BlockSpaceManager, num_micro_batches: int = 1) -> None:
        self._num_micro_batches = num_micro_batches
        self.running: list[RequestState] = []
        self.finishing: dict[str, RequestState] = {}
        self.finished_ids: list[str] = []
        self._block_space_manager = block_space_manager

    def __len__(self) -> int:
        """Requests that hold memory; each occupies a slot of the cache."""
        return len(self.running) + len(self.finishing)

    def split(self) -> tuple[list[RequestState], list[RequestState]]:
        """Running requests with one token left to compute, as far as a step may have them, and those with more.

        Each in order of arrival.
        """
        decodes: list[RequestState] = []
        prefills: list[RequestState] = []
        for state in self.running:
            request = state.request
            if state.is_receiving:
                continue
            (decodes if request.num_tokens - request.num_computed_tokens == 1 else prefills).append(state)
        return decodes if self._num_micro_batches == 1 else self._micro_batch(decodes), prefills

    def _micro_batch(self, decodes: list[RequestState]) -> list[RequestState]:
        """An equal share of the decodes; those whose token is known, oldest first."""
        return [each for each in decodes if not each.request.num_pending_tokens][
            : -(-len(decodes) // self._num_micro_batches)
        ]

    def release(self, state: RequestState) -> None:
        """Free the memory of an ended request that the worker knows, now or after its last step in flight."""
        request = state.request
        if state.steps_in_flight:
            self.finishing[request.request_id] = state
            return
        self._block_space_manager.free(request)
        self.finished_ids.append(request.request_id)
        self.finishing.pop(request.request_id, None)

    def release_ended(self, step: Step) -> None:
        """Account for the end of a step that was rolled back."""
        for state in (*step.states, *step.receiving):
            state.steps_in_flight -= 1
            if state.request.is_finished:
                self.release(state)

    def remove_ended(self) -> None:
        """Remove ended requests from `running`."""
        self.running = [state for state in self.running if not state.request.is_finished]

    def reset(self, ids: Iterable[str]) -> None:
        """Remove every request and release every allocation, even if the accounting is inconsistent.

        ids: ended requests that the worker is told about, besides those that are due.
        """
        self.finished_ids = list(dict.fromkeys([*self.finished_ids, *self.finishing, *ids]))
        self.running.clear()
        self.finishing.clear()
        self._block_space_manager.clear()

    def check_integrity(self, states: Mapping[str, RequestState]) -> None:
        """Raise RuntimeError if a request runs twice or is not in `states`, or if no request holds the rows in use."""
        self._block_space_manager.check_integrity()
        running = [state.request.request_id for state in self.running]
        if len(set(running)) < len(running) or not states.keys() >= set(running):
            raise RuntimeError(f"a request runs twice or after its end: {running}")
        if not len(self) and self._block_space_manager.num_used_rows:
            raise RuntimeError(f"{self._block_space_manager.num_used_rows} rows are held by no request")
