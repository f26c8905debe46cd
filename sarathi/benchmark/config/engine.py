"""The engine's configuration, from a benchmark's.

Every engine knob is passed on or rejected; none is silently ignored.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.config.backend import AUTO, BackendSpec
from sarathi.config.knobs import ConfigError, sections_of
from sarathi.config.load import load_config
from sarathi.config.schema import EngineConfig
from sarathi.config.units import parse_bytes

_LEAST_PAGE_BYTES = 1024  # of virtual memory; a smaller block_size counts tokens, as the original's default of 128
logger = logging.getLogger(__name__)


def engine_config(config: BenchmarkConfig, device: str | None = None) -> EngineConfig:
    """The engine configuration of one replica; `device` overrides model.device."""
    model, scheduler = config.model, config.replica_scheduler
    settings: dict[str, object] = {
        "model.model": model.name,
        "model.tokenizer": model.tokenizer,
        "model.dtype": model.dtype,
        "model.device": (device or model.device).lower(),
        "model.load_format": model.load_format,
        "model.max_model_len": model.max_model_len,
        "model.seed": config.seed,
        "model.attention_backend": sized_backend(model.attention_backend, model.block_size),
        "model.enforce_eager": config.metrics_store.enable_op_level_metrics,
        "cache.memory_bytes": model.kv_cache_bytes,
        "cache.prefix_caching": model.prefix_caching,
        "cache.prefix_eviction": model.prefix_eviction,
        "cache.gpu_memory_utilization": config.gpu_memory_utilization,
        "parallel.executor": "ray" if config.cluster.executor == "ray" else AUTO,
        "parallel.tensor_parallel_size": model.tensor_parallel_degree,
        "parallel.pipeline_parallel_size": model.pipeline_parallel_degree,
        "scheduler.type": scheduler.provider,
        "scheduler.max_num_seqs": scheduler.max_batch_size,
    }
    return load_config(EngineConfig, overrides=settings | _policy_settings(config))


def without_workload(config: BenchmarkConfig) -> BenchmarkConfig:
    """`config` without workload and output folder: runs for which this is equal can share an engine."""
    sections = sections_of(BenchmarkConfig).items()
    none: dict[str, Any] = {name: make() for name, make in sections if name.endswith("_generator")}
    return replace(config, output_dir="", **none)


def sized_backend(name: str, block_size: str | None) -> str:
    """The backend's name with block_size as suffix: tokens for paged memory, page bytes for virtual memory."""
    if block_size is None:
        return name
    if name == AUTO:
        raise ConfigError(f"model.block_size is {block_size!r}: it needs model.attention_backend to name a backend")
    spec = BackendSpec.parse(name)
    if spec.page_bytes is not None or spec.block_size is not None:
        raise ConfigError(
            f"model.block_size is {block_size!r}, but {name!r} gives a size already: leave one of them out"
        )
    if not spec.is_paged and parse_bytes(block_size) < _LEAST_PAGE_BYTES:
        logger.warning("model.block_size %s has no effect: %r has no blocks of tokens", block_size, name)
        return name
    word = block_size if spec.is_paged else f"{parse_bytes(block_size)}b"
    return str(BackendSpec.parse(f"{name}_{word}"))


def _policy_settings(config: BenchmarkConfig) -> dict[str, object]:
    provider = config.replica_scheduler.provider
    if provider == "sarathi":
        return _sarathi_settings(config)
    if provider == "simple_chunking":
        return {"scheduler.chunk_size": config.simple_chunking_scheduler.chunk_size}
    return {"scheduler.max_batched_tokens": config.vllm_scheduler.max_tokens_in_batch}


def _sarathi_settings(config: BenchmarkConfig) -> dict[str, object]:
    knobs = config.sarathi_scheduler
    if knobs.enable_dynamic_chunking_schedule and knobs.target_step_time is not None:
        raise ConfigError(
            f"sarathi_scheduler.target_step_time is {knobs.target_step_time}: it must be none where "
            "enable_dynamic_chunking_schedule is true: the budget is either scheduled or learned"
        )
    settings: dict[str, object] = {
        "scheduler.chunk_size": knobs.chunk_size,
        "scheduler.max_chunk_per_request": knobs.max_chunk_per_request,
        "scheduler.max_num_partial_prefills": knobs.max_num_partial_prefills,
        "scheduler.rolling_prefills": knobs.enable_rolling_prefills,
    }
    if not knobs.enable_dynamic_chunking_schedule and knobs.target_step_time is None:
        return settings
    budget: dict[str, object] = {
        "policy": "schedule" if knobs.target_step_time is None else "latency",
        "low_chunk_size": knobs.low_chunk_size,
        "high_chunk_size": knobs.high_chunk_size,
        "chunk_schedule_max_tokens": knobs.chunk_schedule_max_tokens,
        "chunk_schedule_stages": knobs.chunk_schedule_stages,
    }
    if knobs.target_step_time is not None:
        budget["target_step_s"] = knobs.target_step_time
    return settings | {f"scheduler.chunk_budget.{name}": value for name, value in budget.items()}
