"""The part of scheduling that all policies share: a request's way from arrival to its end, one step at a time.

A policy is a subclass whose _fill decides which requests go first. It calls _add_decodes and _add_prefills for running
requests and _admit_waiting for the others; memory, preemption and the end of a request are the same for all.

A step may be scheduled before the results of earlier steps are known: the token that a request still waits for counts
as pending, and is on the device when the next step needs it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.base import BlockSpaceManager, Grant, Hit
from sarathi.core.scheduler.prefill_policy import PrefillPolicy
from sarathi.core.scheduler.request_lifecycle import RequestLifecycle
from sarathi.core.scheduler.request_state import RequestState, Step, WaitingQueue
from sarathi.messages import NOT_FINITE, RequestUpdate, SampledToken, SchedulerOutput, StepResult
from sarathi.request import Request, RequestStatus

logger = logging.getLogger(__name__)
_MAX_DEFERRED = 32  # requests that a step passes over
_MAX_DEFERRALS = 256  # steps that pass over one request
_FEW_TOKENS = 32  # that are missing of a cached prompt: another engine is not asked for them
_NO_HIT = Hit()


class Scheduler(RequestLifecycle, ABC):
    """Decides what each step computes, and keeps the memory of all requests within the block space manager's capacity.

    max_model_len, num_micro_batches: see RequestLifecycle. most_received_tokens: of prompts that another engine
    computes for this one at the same time; 0: it computes all itself.
    """

    _may_defer = True  # a request that waits for another one to compute its beginning can start in a later step

    def __init__(
        self, config: SchedulerConfig, block_space_manager: BlockSpaceManager, max_model_len: int,
        num_micro_batches: int = 1, most_received_tokens: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(config, block_space_manager, max_model_len, num_micro_batches)
        self._most_received_tokens = most_received_tokens
        self._prefill_policy = self._make_prefill_policy()
        self._in_flight: dict[int, Step] = {}
        self._withdrawn: list[str] = []
        self._arrived: list[Request] = []  # whose prompts another engine has computed since the last step
        self._num_steps = 0

    @abstractmethod
    def _make_prefill_policy(self) -> PrefillPolicy:
        """How this policy divides prompts between steps."""

    @abstractmethod
    def _fill(self, step: Step) -> None:
        """Fill `step` in this policy's order."""

    def schedule(self) -> SchedulerOutput:
        """The next step. It is empty if every request is in flight already, or if it only announces ended requests."""
        step = Step(self._num_steps, withdrawn=tuple(self._withdrawn))
        self._num_steps += 1
        self._withdrawn.clear()
        if self._memory.fit_capacity(step):
            self._fill(step)
            if self._states and self._memory.is_short and not (len(self._running) or step.preempted or step.withdrawn):
                # All wait for more memory, and only the oldest is certain to start with the full capacity. If that
                # fails again, it ends if it does not fit alone, and otherwise starts without another retry.
                self._fit(self._memory.full_capacity.rows)
                self._fill(step)
        return self._send(step)

    def preempt_all(self) -> SchedulerOutput:
        """A step that computes nothing and preempts every running request. No step may be in flight."""
        step = Step(self._num_steps, withdrawn=tuple(self._withdrawn))
        self._num_steps += 1
        self._withdrawn.clear()
        self._memory.preempt_all(step)
        if self._prefixes is not None:
            self._prefixes.evict_all()
        return self._send(step)

    def reset(self) -> None:
        """End every request with reason "error", whatever state an exception left; no step may be in flight.

        The next step tells the worker about the end of every request that it may know, of some for the second time.
        """
        told = [request_id for step in self._in_flight.values() for request_id in step.finished]
        for state in self._states.values():
            if not state.request.is_finished:
                state.request.end("error")
        self._running.reset([*told, *self._states])
        self._states.clear()
        self._in_flight.clear()
        self._withdrawn.clear()
        self._arrived.clear()
        self._waiting = WaitingQueue()

    def _send(self, step: Step) -> SchedulerOutput:
        for state in step.preempted:
            self._waiting.push(state)
        if self._prefixes is not None:
            step.prefix_groups = self._prefixes.groups(step.chunks)
            step.prefixes = self._prefixes.publish([*self._arrived, *step.prefilled])
            self._arrived.clear()
        step.num_used_rows = self.block_space_manager.num_used_rows
        step.finished = tuple(self._running.finished_ids)
        self._in_flight[step.step_id] = step
        self._running.finished_ids.clear()
        return step.output(self._memory.num_recoveries)

    def update(self, output: SchedulerOutput, result: StepResult) -> list[RequestUpdate]:
        """Process the result of the oldest step in flight; returns what requests got a token or ended."""
        oldest = next(iter(self._in_flight), None)
        if output.step_id != oldest or result.step_id != oldest:
            raise ValueError(f"step {output.step_id} with result {result.step_id}: the oldest in flight is {oldest}")
        step = self._in_flight.pop(oldest)
        if self._prefixes is not None:
            self._prefixes.end_step([state.request.request_id for state in step.started])
        if step.is_void:
            self._running.release_ended(step)
            return []
        if result.available_rows is not None:
            failed = [step, *self._in_flight.values()]
            rows = self._memory.roll_back(failed, result.available_rows, self._num_steps)
            for state in self._memory.withdraw_started(failed):
                self._withdrawn.append(state.request.request_id)
                self._waiting.push(state)
            self._running.release_ended(step)
            return self._fit(rows)
        tokens = step.tokens_by_request(result)
        self._prefill_policy.observe(step.num_tokens, result.model_s)
        if self._memory.is_short and step.step_id >= self._memory.retry_step_id:
            self._fit(self._memory.full_capacity.rows)
        return self._append_tokens(step, tokens)

    def end_receive(self, request_id: str, update: RequestUpdate | None) -> list[RequestUpdate]:
        """Another engine is done with a prompt of `SchedulerOutput.received`: go on with its token.

        update: without a token where it could not compute the prompt: then it is computed here. None where the request
        has ended here meanwhile.
        """
        state = self._states.get(request_id) or self._running.finishing[request_id]
        state.steps_in_flight -= 1
        state.is_receiving, state.is_local = False, True
        if update is None or state.request.is_finished:
            state.request.num_computed_tokens = state.num_cached_tokens  # of the others some may be missing
            self._running.release(state)
            return []
        if not update.tokens:
            reason = update.stop_reason or "the other engine has too little memory"
            logger.warning("the prompt of request %s is computed where it decodes: %s", request_id, reason)
            state.request.num_computed_tokens, state.request.num_pending_tokens = state.num_cached_tokens, 0
            return []
        self._arrived.append(state.request)
        state.num_cached_tokens = max(state.num_cached_tokens, update.num_cached_tokens)
        own = state.append(update.tokens[0])
        if own.finish_reason is not None:
            self._end(state, own.finish_reason, own.stop_reason)
            self._running.remove_ended()
        return [own]

    # Building blocks of policies.

    def _add_decodes(self, states: Iterable[RequestState], step: Step) -> None:
        """Add the last uncomputed token of each of these running requests, in this order."""
        for state in states:
            request = state.request
            if state.last_step_id == step.step_id:
                continue  # left out, or preempted, for a request before it
            if request.num_computed_tokens + 1 < request.num_prompt_tokens + state.max_output_tokens:
                self._add_chunk(state, 1, True, step)

    def _add_prefills(self, states: Iterable[RequestState], step: Step) -> None:
        """Add the next chunk of each of these running requests, in this order, as far as the step has room."""
        for state in states:
            length = self._prefill_policy.chunk_length(state.request, step, len(self._running.running))
            if length and state.last_step_id != step.step_id:
                self._add_chunk(state, length, length == state.request.num_remaining_tokens, step)
                step.prefilled.append(state.request)

    def _add_chunk(self, state: RequestState, length: int, samples: bool, step: Step) -> None:
        end = state.request.num_computed_tokens + length
        if end <= state.granted_tokens:
            step.add(state, length, samples, ())
        elif (grant := self._memory.grow(state, end, step)) is not None:
            step.add(state, length, samples, grant.block_ids)

    def _admit_waiting(self, step: Step) -> None:
        """Start waiting requests in order of arrival until one does not fit; none if memory has just run out."""
        deferred: list[RequestState] = []
        while self._may_admit(step) and len(deferred) < _MAX_DEFERRED:
            state = self._waiting.first()
            if state is None:
                break
            hit = _NO_HIT if self._prefixes is None else self._prefixes.find(state.request)
            if self._may_defer and hit.num_awaited_tokens and state.num_deferred < _MAX_DEFERRALS:
                state.num_deferred += bool(step.chunks) or not self._most_received_tokens
                deferred.append(state)
                self._waiting.pop()
            elif not self._start(state, hit.num_cached_tokens, step):
                break
        for state in deferred:
            self._waiting.push(state)

    def _may_admit(self, step: Step) -> bool:
        if step.preempted or step.withdrawn or step.is_starved or len(self._running) >= self.config.max_num_seqs:
            return False
        return self._prefill_policy.max_running is None or len(self._running.running) < self._prefill_policy.max_running

    def _start(self, state: RequestState, num_cached: int, step: Step) -> bool:
        request = state.request
        if self._most_received_tokens and self._is_computed_elsewhere(state, num_cached):
            return self._start_receiving(state, step)
        request.num_computed_tokens = num_cached
        length = self._prefill_policy.chunk_length(request, step, len(self._running.running) + 1)
        is_partial = length < request.num_remaining_tokens
        grant = None
        if length and not (is_partial and step.num_partial >= self.config.max_num_partial_prefills):
            grant = self._first_grant(state)
        if grant is None:
            request.num_computed_tokens = 0
            return False
        self._waiting.pop()
        state.is_local = True
        step.introduce(state)
        if grant.num_cached_tokens:
            step.started.append(state)
        step.add(state, length, length == request.num_remaining_tokens, grant.block_ids)
        step.prefilled.append(request)
        return True

    def _is_computed_elsewhere(self, state: RequestState, num_cached: int) -> bool:
        """Whether the other engine is to compute a prompt: not where little is missing of a cached one."""
        is_nearly_cached = num_cached > 0 and state.request.num_tokens - num_cached <= _FEW_TOKENS
        return not state.is_local and not is_nearly_cached

    def _start_receiving(self, state: RequestState, step: Step) -> bool:
        """Memory for a whole prompt, which another engine computes next. So many wait for it as keep it busy."""
        waiting = [each.request.num_computed_tokens for each in self._running.running if each.is_receiving]
        if waiting and sum(waiting) + state.request.num_tokens > self._most_received_tokens:
            return False
        grant = self._first_grant(state)
        if grant is None:
            return False
        self._waiting.pop()
        step.introduce(state)
        step.receive(state, grant.block_ids)
        return True

    def _first_grant(self, state: RequestState) -> Grant | None:
        """Memory to start with: for all known tokens at once, leaving room for other requests to grow."""
        spare_rows = int(self.config.watermark * self.block_space_manager.capacity.rows) if len(self._running) else 0
        return self._memory.start(state, state.request.num_tokens, spare_rows)

    # The end of a step.

    def _append_tokens(self, step: Step, tokens: Mapping[str, SampledToken]) -> list[RequestUpdate]:
        updates = []
        num_requests = len(self._states)
        for state, chunk in zip(step.states, step.chunks, strict=True):
            state.steps_in_flight -= 1
            if state.request.status is RequestStatus.FINISHED:
                if chunk.samples and tokens[chunk.request_id].token_id == NOT_FINITE:
                    state.request.num_computed_tokens = 0  # what is NaN may not be retained
                self._running.release(state)
            elif chunk.samples:
                updates.append(update := state.append(tokens[chunk.request_id]))
                if update.finish_reason is not None:
                    self._end(state, update.finish_reason, update.stop_reason)
        if len(self._states) < num_requests:
            self._running.remove_ended()
        return updates
