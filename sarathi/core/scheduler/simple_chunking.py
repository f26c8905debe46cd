"""Chunked prefill without mixing: steps of prompt chunks and steps of decodes alternate while there are both."""

from __future__ import annotations

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.base import BlockSpaceManager
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.prefill_policy import PrefillPolicy, make_chunked_prefill
from sarathi.core.scheduler.request_state import Step


class SimpleChunkingScheduler(Scheduler):
    """A decode waits for at most one step of chunks, but every such step delays all decodes."""

    def __init__(
        self, config: SchedulerConfig, block_space_manager: BlockSpaceManager, max_model_len: int,
        num_micro_batches: int = 1, most_received_tokens: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(config, block_space_manager, max_model_len, num_micro_batches, most_received_tokens)
        self._is_decodes_turn = False

    def _make_prefill_policy(self) -> PrefillPolicy:
        return make_chunked_prefill(self.config)

    def _fill(self, step: Step) -> None:
        decodes, prefills = self._running.split()
        if self._is_decodes_turn:
            self._add_decodes(decodes, step)
        if not step.chunks:
            self._add_prefills(prefills, step)
            self._admit_waiting(step)
            self._is_decodes_turn = True
        else:
            self._is_decodes_turn = False
        if not step.chunks:
            self._add_decodes(decodes, step)
