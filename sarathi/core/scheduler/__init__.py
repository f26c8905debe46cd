"""Scheduling policies, by name."""

from __future__ import annotations

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.base import BlockSpaceManager
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.faster_transformer import FasterTransformerScheduler
from sarathi.core.scheduler.memory_recovery import RequestTooLongError
from sarathi.core.scheduler.orca import OrcaScheduler
from sarathi.core.scheduler.sarathi import SarathiScheduler
from sarathi.core.scheduler.simple_chunking import SimpleChunkingScheduler
from sarathi.core.scheduler.vllm import VLLMScheduler

__all__ = ["RequestTooLongError", "Scheduler", "make_scheduler"]

_POLICIES: dict[str, type[Scheduler]] = {
    "sarathi": SarathiScheduler,
    "vllm": VLLMScheduler,
    "orca": OrcaScheduler,
    "faster_transformer": FasterTransformerScheduler,
    "simple_chunking": SimpleChunkingScheduler,
}


def make_scheduler(
    config: SchedulerConfig, block_space_manager: BlockSpaceManager, max_model_len: int, num_micro_batches: int = 1,
    most_received_tokens: int = 0,
) -> Scheduler:  # fmt: skip
    """A scheduler of the policy config.type. For the arguments see Scheduler."""
    return _POLICIES[config.type](config, block_space_manager, max_model_len, num_micro_batches, most_received_tokens)
