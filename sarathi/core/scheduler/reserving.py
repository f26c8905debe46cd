"""Policies that give each request memory for the longest sequence there is. Knows not who goes first."""

from __future__ import annotations

from sarathi.core.block_space_manager.manager import Grant
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.prompt_rule import PromptRule, WholePrompts
from sarathi.core.scheduler.step import Ticket


class ReservingScheduler(Scheduler):
    """Never preempts, for nobody grows; pays with memory that is held and not used."""

    def _make_prompt_rule(self) -> PromptRule:
        return WholePrompts(self.config.max_batched_tokens or self.max_model_len)

    def _first_grant(self, ticket: Ticket) -> Grant | None:
        capacity = self.ledger.capacity
        longest = min(self.max_model_len, capacity.tokens_in(capacity.rows))
        return self._residents.start(ticket, max(ticket.request.num_tokens, longest), spare_rows=0)
