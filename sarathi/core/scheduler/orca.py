"""Orca: requests join and leave at every step, whole prompts beside decodes, memory reserved for the longest.

Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models" (OSDI 2022), section 3:
iteration-level scheduling.
"""

from __future__ import annotations

from sarathi.core.scheduler.reserving import ReservingScheduler
from sarathi.core.scheduler.step import Step


class OrcaScheduler(ReservingScheduler):
    """Decodes never wait, but a step is as long as the prompt in it."""

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._split()
        self._decode(decodes, step)
        self._prefill(prefills, step)
        self._admit(step)
