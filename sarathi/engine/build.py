"""From a configuration to the parts of an engine."""

from functools import partial
from pathlib import Path
from typing import Any

from sarathi.config.knobs import ConfigError
from sarathi.config.runtime import runtime_folder
from sarathi.config.schema import CacheConfig, EngineConfig, ModelConfig
from sarathi.core.factory import make_block_space_manager
from sarathi.core.scheduler import Scheduler, make_scheduler
from sarathi.engine.cache_budget.budget import CacheBudget
from sarathi.engine.cache_budget.group import BudgetGroup
from sarathi.engine.cache_budget.shared import SharedCacheBudget
from sarathi.engine.core import EngineCore
from sarathi.engine.tokenizer.load import TOKENIZER_FILES, load_end_token_ids, load_tokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.engine.tokenizer.vocabulary import make_vocabulary
from sarathi.executor.base import Executor
from sarathi.model_executor.loader.source import ModelSource, resolve_model

_STEPS_RECEIVED = 4  # of prompts that wait for the engine that computes them, so that it always has work


def build_tokenizer(config: EngineConfig) -> tuple[Tokenizer | None, frozenset[int]]:
    """The tokenizer, and the end tokens of it and of the model's own files."""
    tokenizer = load_tokenizer(_tokenizer_source(config.model), config.model.trust_remote_code)
    end_token_ids = frozenset() if tokenizer is None else tokenizer.eos_token_ids
    if tokenizer is None or config.model.tokenizer is not None:
        end_token_ids |= load_end_token_ids(resolve_model(config.model.model, weights=False))
    return tokenizer, end_token_ids


def build_core(config: EngineConfig) -> EngineCore:
    """The core over a new executor, its model loaded; over two of them where prompts have devices of their own."""
    _check_group(config)
    if config.transfer.prefill_decode:
        return _build_prefill_decode(config)
    from sarathi.executor.factory import create_executor  # imports torch, which a tokenizer does not need

    executor = create_executor(config, partial(load_vocabulary, config))
    scheduler = build_scheduler(config, executor)
    return EngineCore(scheduler, executor, budget=_budget(config.cache, scheduler, executor))


def _build_prefill_decode(config: EngineConfig) -> EngineCore:
    from sarathi.engine.prefill_decode.core import PrefillDecodeCore
    from sarathi.engine.prefill_decode.prefill import PrefillCore, PrefillThread
    from sarathi.engine.prefill_decode.start import prefill_config, start_executors
    from sarathi.transfer.portions import Portions

    settings = prefill_config(config)
    prefill, decode, num_layers = start_executors(settings, config, partial(load_vocabulary, config))
    portions = Portions(prefill.resolution.backend, num_layers, config.transfer.max_ranges)
    prefill_thread = PrefillThread(PrefillCore(build_scheduler(settings, prefill), prefill, portions))
    most_received = _STEPS_RECEIVED * settings.scheduler.max_step_tokens(prefill.max_model_len)
    return PrefillDecodeCore(build_scheduler(config, decode, most_received), decode, prefill_thread)


def load_vocabulary(config: EngineConfig, vocab_size: int) -> Any:
    """The tokenizer as llguidance reads it, an LLTokenizer. ValueError where the model has none."""
    tokenizer, end_token_ids = build_tokenizer(config)
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: a grammar has no text to limit")
    return make_vocabulary(tokenizer, vocab_size, end_token_ids)


def build_scheduler(config: EngineConfig, executor: Executor, most_received_tokens: int = 0) -> Scheduler:
    """The scheduler that the configuration asks for, over the block space manager of its backend.

    most_received_tokens: see Scheduler.
    """
    backend, cache = config.model.attention_backend, config.cache
    block_space_manager = make_block_space_manager(
        backend, executor.capacity, cache.prefix_eviction, cascades=executor.resolution.cascade_attention
    )
    return make_scheduler(
        config.scheduler, block_space_manager, executor.max_model_len, executor.num_stages, most_received_tokens
    )


def _check_group(config: EngineConfig) -> None:
    """ConfigError where members could not share their memory, before a model is loaded."""
    group, parallel = config.cache.kv_budget_group, config.parallel
    if group is not None and config.cache.memory_bytes is None:
        raise ConfigError(f"kv_budget_group is {group!r}: it needs memory_bytes, the total that the group shares")
    if group is not None and config.transfer.prefill_decode:
        raise ConfigError(
            f"kv_budget_group is {group!r}: it shares the memory of one device, and prefill_decode has two"
        )
    if group is not None and parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        raise ConfigError(f"kv_budget_group is {group!r}: it shares the memory of one device, and this engine has more")


def _budget(config: CacheConfig, scheduler: Scheduler, executor: Executor) -> CacheBudget:
    """The budget that the cache has alone, or together with others."""
    if config.kv_budget_group is None or config.memory_bytes is None:
        return CacheBudget(scheduler, executor)
    folder = runtime_folder() / f"kv-budget-{config.kv_budget_group}"
    return SharedCacheBudget(scheduler, executor, BudgetGroup(folder, config.memory_bytes))


def _tokenizer_source(config: ModelConfig) -> ModelSource:
    if config.tokenizer is None:
        return resolve_model(config.model, weights=False)
    folder = Path(config.tokenizer).expanduser()
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return ModelSource(config.tokenizer, "safetensors", folder)
    return resolve_model(config.tokenizer, weights=False)
