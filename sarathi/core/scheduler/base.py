"""A request's way from arrival to its end, common to all policies. Knows no policy, no torch and no backend.

A policy is a subclass whose _fill states who goes first. It calls _decode and _prefill for requests that run and
_admit for those that wait; memory, preemption and the end of a request are settled here and in what this is made of.

A step may be scheduled before the results of earlier ones are in: the token that a request is still waiting for is
counted as pending, and is on the device when the next step needs it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.manager import BlockSpaceManager, Grant
from sarathi.core.scheduler.limits import max_output_tokens, refuse_too_long
from sarathi.core.scheduler.prompt_rule import PromptRule
from sarathi.core.scheduler.residents import Residents
from sarathi.core.scheduler.step import Step, Ticket
from sarathi.core.scheduler.waiting import WaitingQueue
from sarathi.messages import SchedulerOutput, StepResult
from sarathi.request import Request, RequestStatus

logger = logging.getLogger(__name__)
_PATIENCE_STEPS = 1000  # after memory ran out, before as much of it is given out again


class Scheduler(ABC):
    """Decides what each step computes, and keeps the memory of all requests within the ledger.

    max_model_len: longest prompt plus output, in tokens. A request that reaches it, or all of the cache, ends with
    finish reason "length".
    """

    def __init__(self, config: SchedulerConfig, ledger: BlockSpaceManager, max_model_len: int) -> None:
        self.config = config
        self.ledger = ledger
        self.max_model_len = max_model_len
        self._residents = Residents(ledger, max_model_len)
        self._waiting = WaitingQueue()
        self._prompts = self._make_prompt_rule()
        self._tickets: dict[str, Ticket] = {}
        self._finished_ids: list[str] = []
        self._in_flight: dict[int, Step] = {}
        self._num_added = 0
        self._num_steps = 0
        self._num_recoveries = 0
        self._full_capacity = ledger.capacity
        self._patient_until = 0

    @abstractmethod
    def _make_prompt_rule(self) -> PromptRule:
        """How this policy cuts prompts."""

    @abstractmethod
    def _fill(self, step: Step) -> None:
        """Put into `step` what this policy wants to go first, then the rest."""

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or the worker has yet to hear of one that has."""
        return bool(self._tickets or self._finished_ids or self._residents.landing)

    @property
    def num_running(self) -> int:
        return len(self._residents.running)

    @property
    def num_waiting(self) -> int:
        return len(self._tickets) - len(self._residents.running)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far, of all requests together."""
        return self._residents.num_preemptions

    def add(self, request: Request) -> None:
        """Queue a request. RequestTooLongError if it could never run; ValueError if its id is in use."""
        if request.request_id in self._tickets or request.request_id in self._residents.landing:
            raise ValueError(f"request id {request.request_id!r} belongs to a request that has not ended")
        if not self._tickets:
            self.ledger.resize(self._full_capacity.rows)
        refuse_too_long(request, self.max_model_len, self._full_capacity)
        stops = frozenset(request.sampling_params.stop_token_ids)
        if not request.sampling_params.ignore_eos:
            stops |= request.eos_token_ids
        ticket = Ticket(request, self._num_added, self._max_output_tokens(request), stops)
        self._num_added += 1
        self._tickets[request.request_id] = ticket
        self._waiting.push(ticket)

    def abort(self, request_id: str) -> bool:
        """End a request at once, in whatever state; False if there is none of that id, which is no error."""
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: str, stop_reason: int | str | None = None) -> bool:
        """End a request for a reason found outside, as a stop string; False if there is none of that id."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._end(ticket, reason, stop_reason)
            self._residents.drop_finished()
        return ticket is not None

    def reset(self) -> None:
        """End every request with reason "error", in whatever state an exception left the books; no step is under way.

        With the next step the worker hears of the end of every request that it may know, of some a second time.
        """
        told = [request_id for step in self._in_flight.values() for request_id in step.finished]
        self._finished_ids = list(dict.fromkeys([*self._finished_ids, *told, *self._residents.landing, *self._tickets]))
        for ticket in self._tickets.values():
            if not ticket.request.is_finished:
                ticket.request.end("error")
        self._tickets.clear()
        self._in_flight.clear()
        self._waiting = WaitingQueue()
        self._residents.clear()

    def resize(self, rows: int) -> list[Request]:
        """Have this much memory for good; returns the requests that this ended, being too long for it."""
        self._full_capacity = replace(self._full_capacity, rows=rows)
        return self._fit(rows)

    def schedule(self) -> SchedulerOutput:
        """The next step. It may be empty: where all is in flight already, or only endings are to be told."""
        step = Step(self._num_steps)
        self._num_steps += 1
        if self._residents.fit_capacity(step):
            self._fill(step)
            if self._may_grow_back(step):
                self._fit(self._full_capacity.rows)
                self._fill(step)
        for ticket in step.preempted:
            self._waiting.push(ticket)
        step.num_used_rows = self.ledger.num_used_rows
        step.finished = tuple(self._finished_ids)
        self._in_flight[step.step_id] = step
        self._finished_ids.clear()
        return step.output(self._num_recoveries)

    def update(self, output: SchedulerOutput, result: StepResult) -> list[Request]:
        """Take in a step's result, oldest step first; returns the requests that got a token or that it ended."""
        step = self._take_oldest(output, result)
        if step.is_void:
            self._land_all(step)
            return []
        if result.available_rows is not None:
            return self._recover(step, result.available_rows)
        if len(result.tokens) != step.num_samples:
            raise ValueError(
                f"step {step.step_id} has {len(result.tokens)} tokens for {step.num_samples} that were due"
            )
        self._prompts.observe(step.num_tokens, result.model_s)
        if self._is_short and step.step_id >= self._patient_until:
            self._fit(self._full_capacity.rows)
        return self._accept_all(step, {sampled.request_id: sampled.token_id for sampled in result.tokens})

    def check_integrity(self) -> None:
        """Raise RuntimeError if the books do not balance."""
        self.ledger.check_integrity()
        running = [ticket.request.request_id for ticket in self._residents.running]
        if len(set(running)) < len(running) or not self._tickets.keys() >= set(running):
            raise RuntimeError(f"a request runs twice or after its end: {running}")
        if not len(self._residents) and self.ledger.num_used_rows:
            raise RuntimeError(f"{self.ledger.num_used_rows} rows are held by no request")

    # What policies are made of.

    def _split(self) -> tuple[list[Ticket], list[Ticket]]:
        """Running requests with one token left to compute, and those with more; each by arrival."""
        decodes: list[Ticket] = []
        prefills: list[Ticket] = []
        for ticket in self._residents.running:
            request = ticket.request
            (decodes if request.num_tokens - request.num_computed_tokens == 1 else prefills).append(ticket)
        return decodes, prefills

    def _decode(self, tickets: Iterable[Ticket], step: Step) -> None:
        """Take the one token left of each of these running requests, in this order."""
        for ticket in tickets:
            request = ticket.request
            if ticket.last_step_id == step.step_id:
                continue  # held back, or preempted, for one before it
            if len(request.output_token_ids) + request.num_pending_tokens < ticket.max_output_tokens:
                self._take(ticket, 1, True, step)

    def _prefill(self, tickets: Iterable[Ticket], step: Step) -> None:
        """Take the next chunk of each of these running requests, in this order, as far as the step has room."""
        for ticket in tickets:
            length = self._length(ticket.request, step, self.num_running)
            if length and ticket.last_step_id != step.step_id:
                self._take(ticket, length, length == ticket.request.num_remaining_tokens, step)

    def _admit(self, step: Step) -> None:
        """Let waiting requests run, by arrival, until one does not fit; none where memory has just run out."""
        while self._may_admit(step):
            ticket = self._waiting.first()
            if ticket is None or not self._start(ticket, step):
                return

    def _first_grant(self, ticket: Ticket) -> Grant | None:
        """Memory to start with: all known tokens at once, leaving others room to grow."""
        spare_rows = int(self.config.watermark * self.ledger.capacity.rows) if len(self._residents) else 0
        return self._residents.start(ticket, ticket.request.num_tokens, spare_rows)

    # A step's parts.

    def _length(self, request: Request, step: Step, num_running: int) -> int:
        return self._prompts.length(request.num_remaining_tokens, request.num_computed_tokens, step, num_running)

    def _take(self, ticket: Ticket, length: int, samples: bool, step: Step) -> None:
        end = ticket.request.num_computed_tokens + length
        if end <= ticket.granted_tokens:
            step.add(ticket, length, samples, ())
        elif (grant := self._residents.grow(ticket, end, step)) is not None:
            step.add(ticket, length, samples, grant.block_ids)

    def _may_admit(self, step: Step) -> bool:
        if step.preempted or step.is_starved or len(self._residents) >= self.config.max_num_seqs:
            return False
        return self._prompts.max_running is None or self.num_running < self._prompts.max_running

    def _start(self, ticket: Ticket, step: Step) -> bool:
        request = ticket.request
        remaining = request.num_remaining_tokens
        length = self._length(request, step, self.num_running + 1)
        if length < remaining and (length == 0 or step.num_partial >= self.config.max_num_partial_prefills):
            return False
        grant = self._first_grant(ticket)
        if grant is None:
            return False
        self._waiting.pop()
        ticket.max_output_tokens = self._max_output_tokens(request)
        if not ticket.is_known:
            ticket.is_known = True
            step.introduce(request)
        step.add(ticket, length, length == remaining, grant.block_ids)
        return True

    # The end of a step, and of a request.

    def _max_output_tokens(self, request: Request) -> int:
        """By the memory there is once it runs, until then by the full cache: a shortage may pass while it waits."""
        is_running = request.status is RequestStatus.RUNNING
        capacity = self.ledger.capacity if is_running else self._full_capacity
        return max_output_tokens(request, self.max_model_len, capacity)

    def _take_oldest(self, output: SchedulerOutput, result: StepResult) -> Step:
        oldest = next(iter(self._in_flight), None)
        if output.step_id != oldest or result.step_id != oldest:
            raise ValueError(f"step {output.step_id} with result {result.step_id}: the oldest in flight is {oldest}")
        return self._in_flight.pop(oldest)

    def _accept_all(self, step: Step, tokens: dict[str, int]) -> list[Request]:
        changed = []
        any_ended = False
        for ticket, chunk in zip(step.tickets, step.chunks, strict=True):
            request = ticket.request
            ticket.steps_in_flight -= 1
            if request.status is RequestStatus.FINISHED:
                self._land(ticket)
            elif chunk.samples:
                token_id = tokens[chunk.request_id]
                request.num_pending_tokens -= 1
                request.output_token_ids.append(token_id)
                changed.append(request)
                if ticket.may_end_with(token_id):
                    any_ended |= self._end_by_rule(ticket, token_id)
        if any_ended:
            self._residents.drop_finished()
        return changed

    def _end_by_rule(self, ticket: Ticket, token_id: int) -> bool:
        """End a request if its newest token says so; True if it does."""
        end = ticket.end_with(token_id)
        if end is not None:
            self._end(ticket, *end)
        return end is not None

    def _end(self, ticket: Ticket, reason: str, stop_reason: int | str | None) -> None:
        request = ticket.request
        was_running = request.status is RequestStatus.RUNNING
        request.end(reason, stop_reason)
        if not was_running:
            self._waiting.note_ended()
        if ticket.is_known and (not was_running or self._residents.leave(ticket)):
            self._finished_ids.append(request.request_id)
        del self._tickets[request.request_id]

    def _land(self, ticket: Ticket) -> None:
        if not ticket.steps_in_flight:
            self._finished_ids.append(ticket.request.request_id)
            self._residents.land(ticket)

    def _land_all(self, step: Step) -> None:
        for ticket in step.tickets:
            ticket.steps_in_flight -= 1
            if ticket.request.is_finished:
                self._land(ticket)

    def _recover(self, step: Step, available_rows: int) -> list[Request]:
        """Memory ran out beneath the ledger: undo this step and those sent behind it, and shrink.

        The ledger shrinks below what this step used in any case, so that the same step cannot fail for ever. It is full
        size again once many steps have gone well, or nobody runs: what was short may have been so for a moment.
        """
        for failed in reversed([step, *self._in_flight.values()]):
            failed.roll_back()
        self._land_all(step)
        self._num_recoveries += 1
        rows = max(0, min(available_rows, step.num_used_rows - 1))
        logger.warning("memory ran out in step %d: going on with %d rows", step.step_id, rows)
        self._patient_until = self._num_steps + _PATIENCE_STEPS
        return self._fit(rows)

    @property
    def _is_short(self) -> bool:
        return self.ledger.capacity.rows < self._full_capacity.rows

    def _may_grow_back(self, step: Step) -> bool:
        """Whether all who are left wait for more memory than there was after the last shortage.

        Only the oldest of them is sure to start with it. Should that fail, it is ended where it does not fit alone in
        what there is then, and otherwise starts in that without growing back: each time is the last for somebody.
        """
        is_stuck = bool(self._tickets) and not len(self._residents) and not step.preempted
        return is_stuck and self._is_short

    def _fit(self, rows: int) -> list[Request]:
        """Have this much memory until there is more again; returns the requests that this ended.

        Who runs must fit in it alone. Who waits need only fit in the full cache.
        """
        self.ledger.resize(rows)
        ended = []
        for ticket in list(self._tickets.values()):
            request = ticket.request
            ticket.max_output_tokens = self._max_output_tokens(request)
            if request.num_output_tokens >= ticket.max_output_tokens:
                self._end_for_memory(ticket)
                ended.append(request)
        self._residents.drop_finished()
        return ended

    def _end_for_memory(self, ticket: Ticket) -> None:
        request, rows = ticket.request, self.ledger.capacity.rows
        self._end(ticket, "length" if request.output_token_ids else "error", None)
        logger.warning(
            "request %s ended with reason %s: it has %d tokens, and the cache has room for %d (%d rows)",
            request.request_id, request.finish_reason, request.num_tokens, self.ledger.capacity.tokens_in(rows), rows,
        )  # fmt: skip
