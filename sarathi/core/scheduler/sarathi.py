"""Sarathi-Serve's stall-free schedule: all decodes first, then chunks of prompts in the rest of the token budget.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (OSDI 2024), section 4.
"""

from __future__ import annotations

from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.prefill_policy import PrefillPolicy, make_chunked_prefill
from sarathi.core.scheduler.request_state import Step


class SarathiScheduler(Scheduler):
    """Decodes never wait for a prompt: no more requests run than a step has tokens."""

    def _make_prefill_policy(self) -> PrefillPolicy:
        return make_chunked_prefill(self.config)

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._running.split()
        self._add_decodes(decodes, step)
        self._add_prefills(prefills, step)
        self._admit_waiting(step)
