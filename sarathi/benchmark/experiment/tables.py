"""Tables over the runs of an experiment, one kind for each figure of the paper.

A record starts with the columns of IDENTITY, taken from the saved configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sarathi.benchmark.config.schema import BenchmarkConfig, ReplicaSchedulerConfig
from sarathi.benchmark.experiment import measures
from sarathi.benchmark.experiment.collect import FinishedRun
from sarathi.benchmark.experiment.measures import Record
from sarathi.config.backend import AUTO, BackendSpec
from sarathi.config.knobs import knobs_of, sections_of

SUMMARY = ("write_metrics",)
STEPS = (*SUMMARY, "metrics_store.keep_individual_batch_metrics")  # every step and token
IDENTITY = ("model", "backend", "scheduler", "workload", "qps", "num_requests")


class Score(NamedTuple):
    """The compared column; the reference is the best record, along a column of IDENTITY, that qualifies as one."""

    column: str
    more_is_better: bool = False
    along: str = "backend"
    is_reference: Callable[[str], bool] = lambda backend: bool(BackendSpec.parse(backend).is_paged)


class TableKind(NamedTuple):
    """measure: the columns of a run. place: the column whose equal values in one backend need a `variant`.

    score: None: records are not compared. needs: switches, on by default, that must stay on. Drawn by figures.py.
    """

    measure: Callable[[FinishedRun], Record]
    place: str | None = None
    score: Score | None = None
    needs: tuple[str, ...] = SUMMARY


TABLES = {
    "makespan": TableKind(measures.makespan, "workload", Score("makespan_s")),
    "latency": TableKind(measures.latency, "qps", Score("p50")),
    "prefill": TableKind(
        measures.prefill, "context", Score("prefill_tokens_per_s", more_is_better=True), needs=STEPS
    ),
    "decode": TableKind(
        measures.decode, "batch_size", Score("decode_tokens_per_s", more_is_better=True), needs=STEPS
    ),
    "decode_steps": TableKind(measures.decode_steps, needs=STEPS),
    "between_tokens": TableKind(
        measures.between_tokens, needs=STEPS,
        score=Score("tbt_p99", along="scheduler", is_reference=lambda scheduler: scheduler == "vllm"),
    ),
}  # fmt: skip


def identity(run: FinishedRun) -> Record:
    """The columns of IDENTITY. The number of requests is the result's: a replayed trace has its own."""
    config = run.config
    values = (
        config.model.name, config.model.attention_backend, config.replica_scheduler.provider, workload_name(config),
        rate_of(config), run.summary["num_requests"],
    )  # fmt: skip
    return dict(zip(IDENTITY, values, strict=True))


def rate_of(config: BenchmarkConfig) -> float | None:
    """Configured requests per second; None if all arrive at once or at the times of a trace."""
    if config.request_generator.provider == "trace":
        return None
    poisson, gamma = config.poisson_request_interval_generator, config.gamma_request_interval_generator
    return {"poisson": poisson.qps, "gamma": gamma.qps}.get(config.synthetic_request_generator.interval_provider)


def workload_name(config: BenchmarkConfig) -> str:
    """Short name of the lengths: "32768 tokens, P:D 500" or a trace's name."""
    if config.request_generator.provider == "trace":
        return Path(str(config.trace_request_generator.trace_file)).stem
    provider = config.synthetic_request_generator.length_provider
    if provider == "trace":
        return Path(config.trace_request_length_generator.trace_file).stem
    if provider == "fixed":
        fixed = config.fixed_request_length_generator
        return f"{fixed.prefill_tokens} + {fixed.decode_tokens} tokens"
    if provider in ("prefix_repetition", "multi_turn"):
        return provider.replace("_", " ")
    zipf, uniform = config.zipf_request_length_generator, config.uniform_request_length_generator
    lengths = uniform if provider == "uniform" else zipf
    span = f"{lengths.min_tokens}-" if lengths.min_tokens != lengths.max_tokens else ""
    return f"{span}{lengths.max_tokens} tokens, P:D {lengths.prefill_to_decode_ratio:g}"


def make_table(kind: TableKind, runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """One record per run, with its variant and its ratio to the reference of the same workload."""
    records = pd.DataFrame([identity(run) | kind.measure(run) for run in runs])
    if kind.score is not None:
        work_of = WORKS[kind.score.along]
        records = compared(records, [work_of(run.config) for run in runs], kind.score)
    return records.assign(variant=variants(records, runs, kind.place)).convert_dtypes()


def compared(records: pd.DataFrame, works: Sequence[Hashable], score: Score) -> pd.DataFrame:
    """Add `reference`, the best reference of the same workload, and `ratio`: > 1 is better."""
    column, along = score.column, score.along
    records = records.assign(work=pd.factorize(pd.Series(works, dtype=object))[0])
    references = records[records[along].map(score.is_reference)].dropna(subset=[column])
    best = references.sort_values(column, ascending=not score.more_is_better, kind="stable").groupby("work").first()
    found = records.join(best[[along, column]].set_axis(["reference", "best"], axis=1), on="work")
    ratio = found[column] / found["best"] if score.more_is_better else found["best"] / found[column]
    return found.assign(ratio=ratio).drop(columns=["work", "best"])


def _but_backend(config: BenchmarkConfig) -> BenchmarkConfig:
    return replace(_but_folder(config), model=replace(config.model, attention_backend=AUTO, block_size=None))


def _but_scheduler(config: BenchmarkConfig) -> BenchmarkConfig:
    """The batch size is part of the workload, the scheduling policy is not."""
    size = ReplicaSchedulerConfig(max_batch_size=config.replica_scheduler.max_batch_size)
    sections = sections_of(BenchmarkConfig).items()
    none: dict[str, Any] = {name: make() for name, make in sections if name.endswith("_scheduler")}
    return replace(_but_folder(config), **{**none, "replica_scheduler": size})


def _but_folder(config: BenchmarkConfig) -> BenchmarkConfig:
    """The configuration without output folder and log level."""
    return replace(config, output_dir="", log_level="info", show_progress=False)


# All settings that two runs must share to be compared along a column, including those without a column.
WORKS: Mapping[str, Callable[[BenchmarkConfig], Hashable]] = {"backend": _but_backend, "scheduler": _but_scheduler}


def variants(records: pd.DataFrame, runs: Sequence[FinishedRun], place: str | None) -> pd.Series:
    """What distinguishes runs of one model and backend at one place: common words, else knobs, else folders."""
    places = records[place] if place else pd.Series(0, index=records.index)
    found = pd.Series("", index=records.index)
    for tell in (_words, _knobs, _folder):
        words = pd.DataFrame([tell(run) for run in runs])
        alike = words.groupby([records["model"], records["backend"], found, places], dropna=False)
        for kind in words.columns[alike.nunique().gt(1).any()]:
            found = found.str.cat(words[kind], sep=" ")
    return found.str.split().str.join(" ")


def _words(run: FinishedRun) -> dict[str, str]:
    """The usual differences between runs of one model and backend."""
    rate, policy = rate_of(run.config), run.config.replica_scheduler.provider
    told = {"policy": policy, "budget": measures.budget_name(run.config), "workload": workload_name(run.config)}
    return told | {"rate": "" if rate is None else f"{rate:g} requests/s"}


def _knobs(run: FinishedRun) -> dict[str, str]:
    """Every knob, as "seed 3"."""
    config = _but_folder(run.config)
    return {knob.path: f"{knob.leaf} {attrgetter(knob.path)(config)}" for knob in knobs_of(BenchmarkConfig)}


def _folder(run: FinishedRun) -> dict[str, str]:
    """The last two components of the run's folder."""
    return {"folder": "/".join(run.folder.parts[-2:])}
