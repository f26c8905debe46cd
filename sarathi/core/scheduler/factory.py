"""Which class goes with a policy's name. Knows nothing else of the policies."""

from __future__ import annotations

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.manager import BlockSpaceManager
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.faster_transformer import FasterTransformerScheduler
from sarathi.core.scheduler.orca import OrcaScheduler
from sarathi.core.scheduler.sarathi import SarathiScheduler
from sarathi.core.scheduler.simple_chunking import SimpleChunkingScheduler
from sarathi.core.scheduler.vllm import VLLMScheduler

_POLICIES: dict[str, type[Scheduler]] = {
    "sarathi": SarathiScheduler,
    "vllm": VLLMScheduler,
    "orca": OrcaScheduler,
    "faster_transformer": FasterTransformerScheduler,
    "simple_chunking": SimpleChunkingScheduler,
}


def make_scheduler(config: SchedulerConfig, ledger: BlockSpaceManager, max_model_len: int) -> Scheduler:
    """A scheduler of the policy config.type."""
    return _POLICIES[config.type](config, ledger, max_model_len)
