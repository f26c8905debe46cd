"""A run's files where the plot scripts and notebooks of Sarathi-Serve and vAttention look for them.

benchmark_config.yml   requests.json
replica_0/{config.yml, sequence_metrics.csv, batch_metrics.csv, operation_metrics.csv, ...}
replica_0/plots/{METRIC.csv, METRIC_list.csv, SERIES_time_series.csv}

All replicas are together in replica_0, as there. Its tables and plots are links to the report's: columns are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

import yaml

from sarathi.benchmark.config.engine import engine_config
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.outcome import RunOutcome
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.config.knobs import knobs_of
from sarathi.metrics.files import open_replacing

CONFIG_FILE, REQUESTS_FILE, REPLICA_FOLDER = "benchmark_config.yml", "requests.json", "replica_0"
# Names in replica_0/config.yml, which are those of their engine's arguments, and our knobs.
_ENGINE_NAMES = {
    "model": "model.model", "tokenizer": "model.tokenizer", "dtype": "model.dtype", "seed": "model.seed",
    "load_format": "model.load_format", "max_model_len": "model.max_model_len",
    "attention_backend": "model.attention_backend", "tensor_parallel_size": "parallel.tensor_parallel_size",
    "pipeline_parallel_size": "parallel.pipeline_parallel_size",
    "gpu_memory_utilization": "cache.gpu_memory_utilization",
    "scheduler_type": "scheduler.type", "max_num_seqs": "scheduler.max_num_seqs", "chunk_size": "scheduler.chunk_size",
    "max_num_batched_tokens": "scheduler.max_batched_tokens",
}  # fmt: skip


def write_original_files(config: BenchmarkConfig, outcomes: Sequence[RunOutcome]) -> None:
    """All of them into output_dir, which exists. Tables and plots are links to the report's own."""
    folder = Path(config.output_dir)
    _write_yaml(folder / CONFIG_FILE, {each.flat: attrgetter(each.path)(config) for each in knobs_of(BenchmarkConfig)})
    if config.write_json_trace:
        _write_requests(folder / REQUESTS_FILE, outcomes)
    replica = folder / REPLICA_FOLDER
    replica.mkdir(exist_ok=True)
    engine = engine_config(config)
    plain = {name: attrgetter(path)(engine) for name, path in _ENGINE_NAMES.items()}
    _write_yaml(replica / "config.yml", plain | {"attention_backend": str(plain["attention_backend"])})
    has_report = any(outcome.records is not None for outcome in outcomes)
    for name in _linked(config) if has_report else ():
        (replica / name).symlink_to(Path("..") / name)


def remove_original_files(folder: Path) -> None:
    """Those of an older run; nothing else."""
    replica = folder / REPLICA_FOLDER
    links = [path for path in replica.glob("*") if path.is_symlink()]
    for path in (*links, replica / "config.yml", folder / CONFIG_FILE, folder / REQUESTS_FILE):
        path.unlink(missing_ok=True)


def _linked(config: BenchmarkConfig) -> list[str]:
    """What the report writes that the original has in replica_0."""
    knobs = config.metrics_store
    wanted = {
        "sequence_metrics.csv": True,
        "batch_metrics.csv": knobs.keep_individual_batch_metrics,
        "operation_metrics.csv": knobs.enable_op_level_metrics,
        "cpu_operation_metrics.csv": knobs.enable_cpu_op_level_metrics,
        "plots": True,
    }
    return [name for name, is_written in wanted.items() if is_written]


def _write_requests(path: Path, outcomes: Sequence[RunOutcome]) -> None:
    """What was asked of the engine, in order of arrival: also of requests that were refused or cut off."""
    numbered = sorted((each for outcome in outcomes for each in outcome.requests), key=lambda each: each[0])
    with open_replacing(path) as file:
        json.dump([_request(number, spec) for number, spec in numbered], file, indent=2)


def _request(number: int, spec: RequestSpec) -> dict[str, float]:
    return {
        "id": number,
        "arrived_at": spec.arrived_at_s,
        "num_prefill_tokens": spec.num_prefill_tokens,
        "num_decode_tokens": spec.num_decode_tokens,
    }


def _write_yaml(path: Path, content: Mapping[str, object]) -> None:
    with open_replacing(path) as file:
        yaml.safe_dump(dict(content), file, sort_keys=False)
