"""Sarathi-Serve: decodes first, and what the token budget leaves goes to chunks of prompts. Knows no memory policy.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (OSDI 2024), section 4: the
stall-free schedule.
"""

from __future__ import annotations

from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.chunk_budget import make_chunk_budget
from sarathi.core.scheduler.prompt_rule import Chunks, PromptRule
from sarathi.core.scheduler.step import Step


class SarathiScheduler(Scheduler):
    """No decode ever waits for a prompt: no more requests run than a step has tokens."""

    def _make_prompt_rule(self) -> PromptRule:
        return Chunks(make_chunk_budget(self.config), self.config.max_chunk_per_request)

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._split()
        self._decode(decodes, step)
        self._prefill(prefills, step)
        self._admit(step)
