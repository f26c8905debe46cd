"""Requests that hold memory: who runs, who is preempted for whom, who still lands. Knows no policy and no queue.

The oldest running request is never preempted while another could be, so it always comes to its end, and then the next
one is the oldest: nobody waits for ever. Among the others the one goes that has computed least, and so loses least.

Memory is in use until the result of the last step with its request is in. A request in flight is therefore not
preempted: it is left out of one step, and is there for the taking in the next.
"""

from __future__ import annotations

import logging
from bisect import insort

from sarathi.core.block_space_manager.manager import BlockSpaceManager, Grant
from sarathi.core.scheduler.step import Step, Ticket
from sarathi.request import RequestStatus

logger = logging.getLogger(__name__)


class Residents:
    """Running requests in order of arrival, and ended ones whose last step is in flight ("landing")."""

    def __init__(self, ledger: BlockSpaceManager, max_model_len: int) -> None:
        self.ledger = ledger
        self.running: list[Ticket] = []
        self.landing: dict[str, Ticket] = {}
        self.num_preemptions = 0
        self._max_model_len = max_model_len

    def __len__(self) -> int:
        """Requests that hold memory; each takes a slot of the cache."""
        return len(self.running) + len(self.landing)

    def start(self, ticket: Ticket, num_tokens: int, spare_rows: int) -> Grant | None:
        """Let a request run, with memory for num_tokens; None where that would not leave spare_rows free."""
        grant = self.ledger.allocate(ticket.request, num_tokens, spare_rows)
        if grant is None:
            return None
        self._hold(ticket, grant)
        ticket.request.status = RequestStatus.RUNNING
        insort(self.running, ticket, key=_by_place)
        return grant

    def grow(self, ticket: Ticket, num_tokens: int, step: Step) -> Grant | None:
        """Memory for num_tokens of a running request, if need be from those who lose least.

        None where it is preempted itself, or where those who should give way are in flight.
        """
        while (grant := self.ledger.allocate(ticket.request, num_tokens)) is None:
            if step.is_starved or not self._preempt_one(step, allow_oldest=False):
                step.is_starved = True
                return None
            if ticket.request.status is RequestStatus.PREEMPTED:
                return None
        self._hold(ticket, grant)
        return grant

    def fit_capacity(self, step: Step) -> bool:
        """Preempt until all who run fit in a ledger that has shrunk; False where that must wait for steps in flight."""
        while self.ledger.is_overcommitted:
            if not self._preempt_one(step, allow_oldest=True):
                return False
        return True

    def leave(self, ticket: Ticket) -> bool:
        """A running request has ended: release its memory, or let it land; True if released."""
        if ticket.steps_in_flight:
            self.landing[ticket.request.request_id] = ticket
            return False
        self.ledger.free(ticket.request)
        return True

    def land(self, ticket: Ticket) -> None:
        """The last step with an ended request is done: release its memory."""
        del self.landing[ticket.request.request_id]
        self.ledger.free(ticket.request)

    def clear(self) -> None:
        """Nobody holds memory any more, whatever the books say."""
        self.running.clear()
        self.landing.clear()
        self.ledger.clear()

    def drop_finished(self) -> None:
        """Forget the running requests that have ended."""
        self.running = [ticket for ticket in self.running if not ticket.request.is_finished]

    def _hold(self, ticket: Ticket, grant: Grant) -> None:
        """A grant is rounded up to whole rows, which may reach past the longest sequence there is."""
        ticket.granted_tokens = min(grant.num_tokens, self._max_model_len)

    def _preempt_one(self, step: Step, allow_oldest: bool) -> bool:
        victim = self._cheapest_victim(step, allow_oldest)
        if victim is None:
            return False
        if victim.steps_in_flight:
            victim.last_step_id = step.step_id
            return False
        self._preempt(victim, step)
        return True

    def _cheapest_victim(self, step: Step, allow_oldest: bool) -> Ticket | None:
        """Of those not yet in this step: first who is not in flight, then who has computed least, then the youngest."""
        candidates = [ticket for ticket in self.running[1:] if ticket.last_step_id != step.step_id]
        if not candidates and allow_oldest:
            candidates = self.running[:1]
        return min(candidates, key=_by_loss, default=None)

    def _preempt(self, ticket: Ticket, step: Step) -> None:
        request = ticket.request
        used, capacity = self.ledger.num_used_rows, self.ledger.capacity.rows
        logger.warning(
            "preempted request %s: %d computed tokens lost, preemption %d of this request; %d of %d rows were in use",
            request.request_id, request.num_computed_tokens, request.num_preemptions + 1, used, capacity,
        )  # fmt: skip
        self.ledger.free(request)
        self.running.remove(ticket)
        ticket.granted_tokens = 0
        ticket.last_step_id = step.step_id
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self.num_preemptions += 1
        step.preempted.append(ticket)


def _by_place(ticket: Ticket) -> int:
    return ticket.place


def _by_loss(ticket: Ticket) -> tuple[bool, int, int]:
    return ticket.steps_in_flight > 0, ticket.request.num_computed_tokens, -ticket.place
