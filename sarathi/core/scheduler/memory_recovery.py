"""Memory shortage, and the way back.

The block space manager has no rows left: requests are preempted. The worker has less memory than the block space
manager counts on: the step that found out and those sent behind it are rolled back, and the capacity shrinks to what is
available. The second kind may be temporary, so the full capacity is tried again after _RETRY_STEPS steps, when no
request can run without it, and when a request arrives while there is no other.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Iterable, Sequence
from operator import attrgetter

from sarathi.core.block_space_manager.base import BlockSpaceManager, Grant
from sarathi.core.scheduler.request_state import RequestState, RunningRequests, Step
from sarathi.request import Request, RequestStatus

logger = logging.getLogger(__name__)
_RETRY_STEPS = 1000


class RequestTooLongError(ValueError):
    """A request that could never run, refused on arrival."""


class MemoryRecovery:
    """Preemption, the full and the current capacity, and the lengths that they allow.

    num_recoveries: failed steps that the scheduler knows of. full_capacity: without a shortage.
    reachable_capacity: to which the full one may be changed, which limits the lengths of requests.
    is_short: whether the current capacity is smaller.
    retry_step_id: after a shortage, the step whose success is the time to try the full capacity again.

    The oldest running request is preempted only if there is no other, so it always finishes and the next becomes the
    oldest: no request starves. Otherwise the victim is the request with the fewest computed tokens, which loses least.
    A request in flight is not preempted, because its memory is in use: it is left out of one step, and can be preempted
    in the next.
    """

    def __init__(self, block_space_manager: BlockSpaceManager, running: RunningRequests, max_model_len: int) -> None:
        self.num_recoveries = 0
        self.num_preemptions = 0
        self.full_capacity = self.reachable_capacity = block_space_manager.capacity
        self.is_short = False
        self._block_space_manager = block_space_manager
        self._running = running
        self._max_model_len = max_model_len
        self.retry_step_id = 0

    # Lengths.

    def check_length(self, request: Request) -> None:
        """Raise RequestTooLongError if the model or the full cache has no room for the prompt and an output token.

        The last output token need not be in the cache.
        """
        num_tokens, capacity = request.num_tokens, self.reachable_capacity
        if num_tokens >= self._max_model_len:
            raise RequestTooLongError(
                f"request {request.request_id!r} has {num_tokens} tokens: the longest sequence is "
                f"{self._max_model_len} tokens, and at least one of them is for the output"
            )
        in_cache = capacity.tokens_in(capacity.rows)
        if num_tokens > in_cache:
            raise RequestTooLongError(
                f"request {request.request_id!r} has {num_tokens} tokens: the whole cache holds {in_cache} "
                f"({capacity.rows} rows)"
            )

    def max_output_tokens(self, request: Request) -> int:
        """Output length at which a request ends: its own limit, the model's, or the cache's.

        In a shortage the current capacity limits a running request, and not a waiting one: the shortage may be over by
        the time it runs.
        """
        is_limited = self.is_short and request.status is RequestStatus.RUNNING
        capacity = self._block_space_manager.capacity if is_limited else self.reachable_capacity
        longest = min(self._max_model_len, capacity.tokens_in(capacity.rows) + 1)
        room = longest - request.num_prompt_tokens
        wanted = request.sampling_params.max_tokens
        return room if wanted is None else min(wanted, room)

    # Preemption.

    def start(self, state: RequestState, num_tokens: int, spare_rows: int) -> Grant | None:
        """Start a request with memory for num_tokens; None if that would leave fewer than spare_rows free."""
        grant = self._block_space_manager.allocate(state.request, num_tokens, spare_rows)
        if grant is not None:
            state.request.num_computed_tokens = grant.num_cached_tokens
            if not state.request.num_preemptions:
                state.num_cached_tokens = grant.num_cached_tokens
            state.request.status = RequestStatus.RUNNING
            insort(self._running.running, state, key=attrgetter("arrival"))
            state.granted_tokens = grant.num_tokens
            state.max_output_tokens = self.max_output_tokens(state.request)
        return grant

    def grow(self, state: RequestState, num_tokens: int, step: Step) -> Grant | None:
        """Memory for num_tokens of a running request, preempting others if necessary.

        None if it is preempted itself, or if the victims are in flight.
        """
        while (grant := self._block_space_manager.allocate(state.request, num_tokens)) is None:
            if step.is_starved or not self._preempt_one(step, allow_oldest=False):
                step.is_starved = True
                return None
            if state.request.status is RequestStatus.PREEMPTED:
                return None
        state.granted_tokens = grant.num_tokens
        return grant

    def fit_capacity(self, step: Step) -> bool:
        """Preempt until all running requests fit in the capacity; False if that has to wait for steps in flight."""
        manager = self._block_space_manager
        while manager.num_used_rows > manager.capacity.rows:
            if not self._preempt_one(step, allow_oldest=True):
                return False
        return True

    def preempt_all(self, step: Step) -> None:
        """Preempt every running request; none may be in flight."""
        while self._preempt_one(step, allow_oldest=True):
            pass

    def _preempt_one(self, step: Step, allow_oldest: bool) -> bool:
        """False if there is no victim, or if it is in flight: then it is left out of this step."""
        running = self._running.running
        candidates = [state for state in running[1:] if state.last_step_id != step.step_id]
        if not candidates and allow_oldest:
            candidates = running[:1]
        victim = min(candidates, key=_preemption_order, default=None)
        if victim is None:
            return False
        if victim.steps_in_flight:
            victim.last_step_id = step.step_id
            return False
        self._preempt(victim, step)
        return True

    def _preempt(self, state: RequestState, step: Step) -> None:
        request = state.request
        used, capacity = self._block_space_manager.num_used_rows, self._block_space_manager.capacity.rows
        logger.warning(
            "preempted request %s: %d computed tokens lost, preemption %d of this request; %d of %d rows were in use",
            request.request_id, request.num_computed_tokens, request.num_preemptions + 1, used, capacity,
        )  # fmt: skip
        self._block_space_manager.free(request)
        self._stop(state)
        state.last_step_id = step.step_id
        request.num_preemptions += 1
        self.num_preemptions += 1
        step.preempted.append(state)

    def _stop(self, state: RequestState) -> None:
        """A request whose memory was given back waits for its next start."""
        self._running.running.remove(state)
        state.granted_tokens = 0
        state.request.num_computed_tokens = 0
        state.request.status = RequestStatus.PREEMPTED

    # Less memory than counted on.

    def roll_back(self, steps: Sequence[Step], available_rows: int, next_step_id: int) -> int:
        """Undo `steps`, the first of which found only available_rows; returns the capacity to continue with, in rows.

        It is smaller than what the failed step used even if more is said to be available, so the same step cannot fail
        forever.
        """
        for step in reversed(steps):
            step.roll_back()
        self.num_recoveries += 1
        self.retry_step_id = next_step_id + _RETRY_STEPS
        rows = max(0, min(available_rows, steps[0].num_used_rows - 1))
        logger.warning("memory ran out in step %d: continuing with %d rows", steps[0].step_id, rows)
        return rows

    def withdraw_started(self, steps: Sequence[Step]) -> list[RequestState]:
        """Take requests back that failed steps were to start from the cache, or from another engine: the worker may
        have nothing of them, nor of what the steps were to compute for others. Returns those that start anew."""
        prefixes = self._block_space_manager.prefixes
        started = [state for step in steps for state in step.started]
        withdrawn = [state for state in started if state.request.status is RequestStatus.RUNNING]
        if prefixes is not None:
            for state in [each for each in started if each.request.is_finished]:
                state.request.num_computed_tokens = 0  # it never got the cached tokens: they are not retained
            for state in [each for step in steps for each in step.states]:
                prefixes.unpublish(state.request)
        for state in withdrawn:
            (self._block_space_manager.free if prefixes is None else prefixes.discard)(state.request)
            self._stop(state)
        for step in steps:
            step.started.clear()
        if prefixes is not None:
            prefixes.evict_all()
        return withdrawn

    def resize(self, rows: int, states: Iterable[RequestState]) -> list[tuple[RequestState, str]]:
        """Set the current capacity; returns the requests that are too long for it, with finish reasons."""
        self._block_space_manager.resize(rows)
        self.is_short = rows < self.full_capacity.rows
        too_long = []
        for state in states:
            state.max_output_tokens = self.max_output_tokens(state.request)
            if state.request.num_output_tokens >= state.max_output_tokens:
                too_long.append((state, self._finish_reason(state.request)))
        return too_long

    def _finish_reason(self, request: Request) -> str:
        reason = "length" if request.num_output_tokens else "error"
        capacity, num_tokens = self._block_space_manager.capacity, request.num_tokens - request.num_pending_tokens
        logger.warning(
            "request %s ended with reason %s: it has %d tokens, and the cache has room for %d (%d rows)",
            request.request_id, reason, num_tokens, capacity.tokens_in(capacity.rows), capacity.rows,
        )  # fmt: skip
        return reason


def _preemption_order(state: RequestState) -> tuple[bool, int, int]:
    """Not in flight first, then the fewest computed tokens, then the youngest."""
    return state.steps_in_flight > 0, state.request.num_computed_tokens, -state.arrival
