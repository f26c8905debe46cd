"""Files that the plot scripts and notebooks of Sarathi-Serve and vAttention read in addition to the report's tables.

benchmark_config.yml  requests.json  replica_0/config.yml
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

import yaml

from sarathi.benchmark.config.engine import engine_config
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.run.outcome import RunOutcome
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.config.knobs import knobs_of
from sarathi.metrics.files import open_replacing
from sarathi.metrics.report import TABLES_FOLDER

CONFIG_FILE, REQUESTS_FILE = "benchmark_config.yml", "requests.json"
# Sarathi-Serve's engine arguments, as named in replica_0/config.yml -> our knobs.
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
    """Write all of them into output_dir, which must exist."""
    folder = Path(config.output_dir)
    _write_yaml(folder / CONFIG_FILE, {each.flat: attrgetter(each.path)(config) for each in knobs_of(BenchmarkConfig)})
    if config.write_json_trace:
        _write_requests(folder / REQUESTS_FILE, outcomes)
    replica = folder / TABLES_FOLDER
    replica.mkdir(exist_ok=True)
    engine = engine_config(config)
    plain = {name: attrgetter(path)(engine) for name, path in _ENGINE_NAMES.items()}
    _write_yaml(replica / "config.yml", plain | {"attention_backend": str(plain["attention_backend"])})


def remove_original_files(folder: Path) -> None:
    """Remove these files of an older run."""
    for path in (folder / TABLES_FOLDER / "config.yml", folder / CONFIG_FILE, folder / REQUESTS_FILE):
        path.unlink(missing_ok=True)


def _write_requests(path: Path, outcomes: Sequence[RunOutcome]) -> None:
    """Write the requests in order of arrival, including refused and unfinished ones."""
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
