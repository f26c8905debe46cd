"""Grids of capacity searches in Sarathi-Serve's YAML: one search per model x trace x scheduler x parallel_spec.

python -m sarathi.benchmark.capacity.main --config-path FILE --output-dir FOLDER [--tbt-slo-value S] [--knob value ...]

models:        [{name, identifier, parallel_specs, scheduler_specs, traces}]    the last three: names, or null for all
traces:        [{name, trace_file, max_seq_len, num_requests, start_qps}]
schedulers:    [{name, scheduler, batch_size, chunk_size}]
parallel_spec: [{name, tp_dimension, pp_dimension}]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarathi.config.knobs import ConfigError
from sarathi.config.load import read_yaml
from sarathi.wording import short_repr

CONFIG_PATH = "config_path"
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "models": ("name", "identifier"),
    "traces": ("name", "trace_file", "max_seq_len", "num_requests", "start_qps"),
    "schedulers": ("name", "scheduler", "batch_size"),
    "parallel_spec": ("name", "tp_dimension", "pp_dimension"),
}
_LIMITS = {"parallel_specs": "parallel_spec", "scheduler_specs": "schedulers", "traces": "traces"}
_UNUSED = ("wandb_project", "wandb_sweep_name", "wandb_sweep_id")
_CHUNKED = {"sarathi": "sarathi_scheduler.chunk_size", "simple_chunking": "simple_chunking_scheduler.chunk_size"}
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One search of a grid. name: of its folder. labels: section -> entry's name. settings: knobs by full path."""

    name: str
    labels: Mapping[str, str]
    settings: Mapping[str, object]


def translate(settings: Mapping[str, str]) -> dict[str, str]:
    """Translate options of Sarathi-Serve's search to knobs; knobs pass unchanged. ConfigError for unsupported options.

    Sarathi-Serve's time_limit is in minutes, with another default for --qps-values; min_search_granularity in percent.
    """
    knobs = {name.replace("-", "_"): value for name, value in settings.items()}
    if unused := [name for name in _UNUSED if name in knobs]:
        raise ConfigError(f"--{unused[0]} is not supported by a capacity search: its results are files")
    if knobs.pop("debug", None) is not None:
        knobs["log_level"] = "debug"
    default_minutes = "180" if "qps_values" in knobs else "30"
    knobs["time_limit"] = str(60 * _number("time_limit", knobs.get("time_limit", default_minutes)))
    if (percent := knobs.pop("min_search_granularity", None)) is not None:
        knobs["capacity_search.tolerance"] = str(_number("min_search_granularity", percent) / 100)
    if (probes := knobs.pop("max_iterations", None)) is not None:
        knobs["capacity_search.max_probes"] = probes
    return knobs


def read_jobs(path: Path) -> list[Job]:
    """The searches of a file, in file order. ConfigError if the file is invalid."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds {short_repr(content)}: it must hold {', '.join(_SECTIONS)}")
    sections = [_entries(path, content, name) for name in _SECTIONS]
    jobs = [_job(*combination) for combination in itertools.product(*sections) if _is_wanted(*combination)]
    if not jobs:
        raise ConfigError(f"{path}: no combination of {', '.join(_SECTIONS)} is left")
    return jobs


def _entries(path: Path, content: Mapping[str, Any], section: str) -> Sequence[Entry]:
    entries = content.get(section)
    if not isinstance(entries, list) or not entries or not all(isinstance(each, Mapping) for each in entries):
        raise ConfigError(f"{path}: {section} is {short_repr(entries)}: it must be a non-empty list of mappings")
    for entry, key in itertools.product(entries, _SECTIONS[section]):
        if key not in entry:
            raise ConfigError(f"{path}: {short_repr(entry)} in {section} lacks {key!r}")
    return entries


def _is_wanted(model: Entry, trace: Entry, scheduler: Entry, parallel: Entry) -> bool:
    """Whether the model's optional lists of names select this combination."""
    names = {"traces": trace["name"], "schedulers": scheduler["name"], "parallel_spec": parallel["name"]}
    return all(names[section] in (model.get(key) or [names[section]]) for key, section in _LIMITS.items())


def _job(model: Entry, trace: Entry, scheduler: Entry, parallel: Entry) -> Job:
    labels = dict(zip(_SECTIONS, (str(each["name"]) for each in (model, trace, scheduler, parallel)), strict=True))
    name = "_".join(label.replace("/", "-") for label in labels.values())
    return Job(name, labels, dict(_settings(model, trace, scheduler, parallel)))


def _settings(model: Entry, trace: Entry, scheduler: Entry, parallel: Entry) -> Iterator[tuple[str, object]]:
    yield "model.name", model["identifier"]
    yield "model.max_model_len", trace["max_seq_len"]
    yield "model.tensor_parallel_degree", parallel["tp_dimension"]
    yield "model.pipeline_parallel_degree", parallel["pp_dimension"]
    yield "synthetic_request_generator.length_provider", "trace"
    yield "synthetic_request_generator.interval_provider", "poisson"
    yield "synthetic_request_generator.num_requests", trace["num_requests"]
    yield "trace_request_length_generator.trace_file", trace["trace_file"]
    yield "trace_request_length_generator.max_tokens", trace["max_seq_len"]
    yield "trace_request_length_generator.min_tokens", 0
    yield "capacity_search.start_qps", trace["start_qps"]
    yield "replica_scheduler.provider", scheduler["scheduler"]
    yield "replica_scheduler.max_batch_size", scheduler["batch_size"]
    if scheduler["scheduler"] not in _CHUNKED:
        yield "vllm_scheduler.max_tokens_in_batch", trace["max_seq_len"]
    elif scheduler.get("chunk_size") is None:
        raise ConfigError(f"scheduler {scheduler['name']!r} lacks 'chunk_size'")
    else:
        yield _CHUNKED[scheduler["scheduler"]], scheduler["chunk_size"]


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: it must be a number") from None
