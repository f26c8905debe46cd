"""Orca: requests join and leave at every step, whole prompts next to decodes, memory reserved for the longest sequence.

Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models" (OSDI 2022), section 3:
iteration-level scheduling.
"""

from __future__ import annotations

from sarathi.core.block_space_manager.base import Grant
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.prefill_policy import FullPrefill, PrefillPolicy
from sarathi.core.scheduler.request_state import RequestState, Step


class OrcaScheduler(Scheduler):
    """Decodes never wait for a later step, but a step takes as long as the prompts in it.

    Requests never grow past their reservation, so none is preempted; the price is memory that is reserved and unused.
    """

    def _make_prefill_policy(self) -> PrefillPolicy:
        return FullPrefill(self.config, self.max_model_len)

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._running.split()
        self._add_decodes(decodes, step)
        self._add_prefills(prefills, step)
        self._admit_waiting(step)

    def _first_grant(self, state: RequestState) -> Grant | None:
        capacity = self.block_space_manager.capacity
        longest = min(self.max_model_len, capacity.tokens_in(capacity.rows))
        return self._memory.start(state, max(state.request.num_tokens, longest), spare_rows=0)
