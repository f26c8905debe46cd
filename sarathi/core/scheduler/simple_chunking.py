"""Chunks without mixing: a step holds chunks of prompts or decodes, in turn while there are both."""

from __future__ import annotations

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.manager import BlockSpaceManager
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.chunk_budget import make_chunk_budget
from sarathi.core.scheduler.prompt_rule import Chunks, PromptRule
from sarathi.core.scheduler.step import Step


class SimpleChunkingScheduler(Scheduler):
    """A decode waits for one chunk at most, but every chunk makes all decodes wait."""

    def __init__(self, config: SchedulerConfig, ledger: BlockSpaceManager, max_model_len: int) -> None:
        super().__init__(config, ledger, max_model_len)
        self._is_decodes_turn = False

    def _make_prompt_rule(self) -> PromptRule:
        return Chunks(make_chunk_budget(self.config), self.config.max_chunk_per_request)

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._split()
        if self._is_decodes_turn:
            self._decode(decodes, step)
        if not step.chunks:
            self._prefill(prefills, step)
            self._admit(step)
            self._is_decodes_turn = True
        else:
            self._is_decodes_turn = False
        if not step.chunks:
            self._decode(decodes, step)
