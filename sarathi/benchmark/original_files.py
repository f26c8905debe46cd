"""A run's files where the plot scripts and notebooks of Sarathi-Serve and vAttention look for them.

benchmark_config.yml   requests.json
replica_0/{config.yml, sequence_metrics.csv, batch_metrics.csv, operation_metrics.csv, ...}
replica_0/plots/{METRIC.csv, METRIC_list.csv, SERIES_time_series.csv}

All replicas are together in replica_0, as there. Columns are theirs, and so are those of the files beside.
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
from sarathi.metrics import RunRecords
from sarathi.metrics.files import open_replacing, write_columns, write_table
from sarathi.metrics.tables import (
    TIME,
    TOKEN_ID,
    TOKEN_TIME,
    batch_table,
    cdf,
    distributions,
    operation_table,
    request_table,
    time_series,
    token_table,
)

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


def write_original_files(config: BenchmarkConfig, outcomes: Sequence[RunOutcome], records: RunRecords | None) -> None:
    """All of them into output_dir, which exists. records: of all replicas together; None where metrics are off."""
    folder = Path(config.output_dir)
    _write_yaml(folder / CONFIG_FILE, {each.flat: attrgetter(each.path)(config) for each in knobs_of(BenchmarkConfig)})
    if config.write_json_trace:
        _write_requests(folder / REQUESTS_FILE, outcomes)
    replica = folder / REPLICA_FOLDER
    (replica / "plots").mkdir(parents=True, exist_ok=True)
    engine = engine_config(config)
    plain = {name: attrgetter(path)(engine) for name, path in _ENGINE_NAMES.items()}
    _write_yaml(replica / "config.yml", plain | {"attention_backend": str(plain["attention_backend"])})
    if records is not None:
        _write_tables(replica, config, records)
        _write_plots(replica / "plots", config, records)


def remove_original_files(folder: Path) -> None:
    """Those of an older run; nothing else."""
    replica = folder / REPLICA_FOLDER
    found = [*replica.glob("*.csv"), *replica.glob("plots/*.csv"), replica / "config.yml"]
    for path in (*found, folder / CONFIG_FILE, folder / REQUESTS_FILE):
        path.unlink(missing_ok=True)


def _write_tables(folder: Path, config: BenchmarkConfig, records: RunRecords) -> None:
    knobs = config.metrics_store
    write_table(folder / "sequence_metrics.csv", request_table(records))
    if knobs.keep_individual_batch_metrics:
        write_table(folder / "batch_metrics.csv", batch_table(records))
    if knobs.enable_op_level_metrics:
        write_table(folder / "operation_metrics.csv", operation_table(records, on_device=True))
    if knobs.enable_cpu_op_level_metrics:
        write_table(folder / "cpu_operation_metrics.csv", operation_table(records, on_device=False))


def _write_plots(folder: Path, config: BenchmarkConfig, records: RunRecords) -> None:
    for name, values in distributions(records).items():
        write_columns(folder / f"{name}.csv", (name, "cdf"), zip(*cdf(values), strict=True))
    for name, points in time_series(records).items():
        write_columns(folder / f"{name}_time_series.csv", (TIME, name), points)
    if config.metrics_store.keep_individual_batch_metrics:
        gaps = token_table(records)
        lines = ((line[TOKEN_ID], line[f"{TOKEN_TIME}_list"]) for line in gaps.records)
        write_columns(folder / f"{TOKEN_TIME}_list.csv", gaps.columns, lines)


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
