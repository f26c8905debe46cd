"""vLLM's original policy: whole prompts first, in steps without decodes; decodes when no prompt can start.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023), section
4.5, with preemption by recomputation.
"""

from __future__ import annotations

from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.prefill_policy import FullPrefill, PrefillPolicy
from sarathi.core.scheduler.request_state import Step


class VLLMScheduler(Scheduler):
    """Shortest time to the first token; running decodes wait for every prompt that starts."""

    def _make_prefill_policy(self) -> PrefillPolicy:
        return FullPrefill(self.config, self.max_model_len)

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._running.split()
        self._add_prefills(prefills, step)
        self._admit_waiting(step)
        if not step.chunks:
            self._add_decodes(decodes, step)
