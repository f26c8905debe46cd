"""From a configuration to the parts of an engine; the one place that knows which part goes with which."""

from pathlib import Path

from sarathi.config.schema import EngineConfig, ModelConfig
from sarathi.core.block_space_manager.factory import make_block_space_manager
from sarathi.core.scheduler.base import Scheduler
from sarathi.core.scheduler.factory import make_scheduler
from sarathi.engine.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.model_executor.loader.source import ModelSource, resolve_model


def build_parts(config: EngineConfig) -> tuple[Scheduler, UniprocExecutor, Tokenizer | None]:
    """Load the tokenizer, then the model (the slow part last), and lay the scheduler's books over its cache."""
    tokenizer = load_tokenizer(_tokenizer_source(config.model))
    executor = UniprocExecutor(config)
    ledger = make_block_space_manager(executor.backend, executor.capacity)
    return make_scheduler(config.scheduler, ledger, executor.max_model_len), executor, tokenizer


def _tokenizer_source(config: ModelConfig) -> ModelSource:
    if config.tokenizer is None:
        return resolve_model(config.model, weights=False)
    folder = Path(config.tokenizer).expanduser()
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return ModelSource(config.tokenizer, "safetensors", folder)
    return resolve_model(config.tokenizer, weights=False)
