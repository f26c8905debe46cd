"""vLLM's first policy: whole prompts first, in steps of their own; decodes when no prompt can start.

Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023), section
4.5, with preemption by recomputing.
"""

from __future__ import annotations

from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.prompt_rule import PromptRule, WholePrompts
from sarathi.core.scheduler.step import Step


class VLLMScheduler(Scheduler):
    """The shortest way to the first token; running decodes wait for every prompt that starts."""

    def _make_prompt_rule(self) -> PromptRule:
        return WholePrompts(self.config.max_batched_tokens or self.max_model_len)

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._split()
        self._prefill(prefills, step)
        self._admit(step)
        if not step.chunks:
            self._decode(decodes, step)
