"""Tables and plots over the runs of an experiment, one kind for each figure.

A record begins with what the run was (columns of IDENTITY), all of it from the saved configuration.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from sarathi.benchmark.config.schema import BenchmarkConfig, ReplicaSchedulerConfig
from sarathi.benchmark.experiment import measures
from sarathi.benchmark.experiment.collect import FinishedRun
from sarathi.benchmark.experiment.measures import Record
from sarathi.config.backend import AUTO, BackendSpec
from sarathi.config.knobs import knobs_of, sections_of
from sarathi.metrics.plots import Points, plot_bars, plot_lines

SUMMARY = ("write_metrics",)
STEPS = (*SUMMARY, "metrics_store.keep_individual_batch_metrics")  # every step and token
IDENTITY = ("model", "backend", "scheduler", "workload", "qps", "num_requests")


def is_paged(record: Record) -> bool:
    """Whether the record's backend keeps keys and values in blocks."""
    return bool(BackendSpec.parse(record["backend"]).is_paged)


class Plot(NamedTuple):
    """Lines over column x, one for each model, backend and what else differs; bars where x is the backend itself."""

    x: str
    y: str


class Score(NamedTuple):
    """A column that records are compared by, along one of IDENTITY, with the best of those that are a reference."""

    column: str
    more_is_better: bool = False
    along: str = "backend"
    is_reference: Callable[[Record], bool] = is_paged


class RunLines(NamedTuple):
    """A line for each run."""

    line: Callable[[FinishedRun], Points]
    x_label: str
    y_label: str


class TableKind(NamedTuple):
    """measure: what a run adds to its record. plots, run_lines (a line for each run): by file name.

    score: what records are compared by; None: not at all. needs: switches, on by default, that write what is read.
    """

    measure: Callable[[FinishedRun], Record]
    plots: Mapping[str, Plot] = MappingProxyType({})
    score: Score | None = None
    run_lines: Mapping[str, RunLines] = MappingProxyType({})
    needs: tuple[str, ...] = SUMMARY


def _rate_table(measure: Callable[[FinishedRun], Record], name: str, x: str) -> TableKind:
    """Tokens a second of a kind of step over x."""
    column = f"{name}_tokens_per_s"
    return TableKind(measure, {f"{name}_throughput": Plot(x, column)}, Score(column, more_is_better=True), needs=STEPS)


TABLES = {
    "makespan": TableKind(measures.makespan, {"makespan": Plot("backend", "makespan_s")}, Score("makespan_s")),
    "latency": TableKind(measures.latency, {name: Plot("qps", name) for name in ("p50", "p90", "p99")}, Score("p50")),
    "prefill": _rate_table(measures.prefill, "prefill", "context"),
    "decode": _rate_table(measures.decode, "decode", "batch_size"),
    "decode_steps": TableKind(
        measures.decode_steps, needs=STEPS,
        run_lines={"decode_steps": RunLines(measures.decode_step_line, "decode step", "ms")},
    ),
    "between_tokens": TableKind(
        measures.between_tokens, needs=STEPS,
        score=Score("tbt_p99", along="scheduler", is_reference=lambda record: record["scheduler"] == "vllm"),
        run_lines={"between_tokens": RunLines(measures.token_gap_cdf, "seconds between tokens", "CDF")},
    ),
}  # fmt: skip


def identity(run: FinishedRun) -> Record:
    """What a run was; the number of requests is that of its result, for a trace that is replayed has its own."""
    config = run.config
    values = (
        config.model.name, config.model.attention_backend, config.replica_scheduler.provider, workload_name(config),
        rate_of(config), run.summary["num_requests"],
    )  # fmt: skip
    return dict(zip(IDENTITY, values, strict=True))


def rate_of(config: BenchmarkConfig) -> float | None:
    """Requests a second that were asked for; None where they come all at once, or at the times of a trace."""
    if config.request_generator.provider == "trace":
        return None
    poisson, gamma = config.poisson_request_interval_generator, config.gamma_request_interval_generator
    return {"poisson": poisson.qps, "gamma": gamma.qps}.get(config.synthetic_request_generator.interval_provider)


def workload_name(config: BenchmarkConfig) -> str:
    """Lengths in a word: "32768 tokens, P:D 500" or the name of a trace."""
    if config.request_generator.provider == "trace":
        return Path(str(config.trace_request_generator.trace_file)).stem
    provider = config.synthetic_request_generator.length_provider
    if provider == "trace":
        return Path(config.trace_request_length_generator.trace_file).stem
    if provider == "fixed":
        fixed = config.fixed_request_length_generator
        return f"{fixed.prefill_tokens} + {fixed.decode_tokens} tokens"
    zipf, uniform = config.zipf_request_length_generator, config.uniform_request_length_generator
    lengths = uniform if provider == "uniform" else zipf
    span = f"{lengths.min_tokens}-" if lengths.min_tokens != lengths.max_tokens else ""
    return f"{span}{lengths.max_tokens} tokens, P:D {lengths.prefill_to_decode_ratio:g}"


def make_records(kind: TableKind, runs: Sequence[FinishedRun]) -> list[Record]:
    """One record a run, compared with the reference of the same work."""
    records = [identity(run) | kind.measure(run) for run in runs]
    if kind.score is None:
        return records
    work_of = WORKS[kind.score.along]
    return list(compared(records, [work_of(run.config) for run in runs], kind.score))


def compared(records: Sequence[Record], works: Sequence[Hashable], score: Score) -> Iterator[Record]:
    """Records with `reference`, the best one of the same work, and `ratio`: > 1 is better than that one."""
    sign = -1 if score.more_is_better else 1
    best: dict[Hashable, Record] = {}
    for record, work in zip(records, works, strict=True):
        if record[score.column] is not None and score.is_reference(record):
            best[work] = min(best.get(work, record), record, key=lambda each: sign * each[score.column])
    for record, work in zip(records, works, strict=True):
        other, own = best.get(work), record[score.column]
        ratio = None if other is None or not own else (other[score.column] / own) ** sign
        yield record | {"reference": None if other is None else other[score.along], "ratio": ratio}


def _but_backend(config: BenchmarkConfig) -> BenchmarkConfig:
    return replace(_but_folder(config), model=replace(config.model, attention_backend=AUTO, block_size=None))


def _but_scheduler(config: BenchmarkConfig) -> BenchmarkConfig:
    """The size of a batch is part of the work, how it is filled is not."""
    size = ReplicaSchedulerConfig(max_batch_size=config.replica_scheduler.max_batch_size)
    sections = sections_of(BenchmarkConfig).items()
    none: dict[str, Any] = {name: make() for name, make in sections if name.endswith("_scheduler")}
    return replace(_but_folder(config), **{**none, "replica_scheduler": size})


def _but_folder(config: BenchmarkConfig) -> BenchmarkConfig:
    """What was run, without where results go and how much is logged."""
    return replace(config, output_dir="", log_level="info", show_progress=False)


# Everything that two runs must share to be compared along a column: what the columns do not show, too.
WORKS: Mapping[str, Callable[[BenchmarkConfig], Hashable]] = {"backend": _but_backend, "scheduler": _but_scheduler}


def draw(kind: TableKind, runs: Sequence[FinishedRun], records: Sequence[Record], folder: Path) -> None:
    """The plots of a kind; one file for each where lines are drawn, one a model and workload where bars are."""
    for name, (line, x_label, y_label) in kind.run_lines.items():
        labels = _labels(runs, [(_line_name(record), "") for record in records])
        lines = {label: line(run) for label, run in zip(labels, runs, strict=True)}
        plot_lines(folder / f"{name}.png", lines, x_label, y_label)
    for name, plot in kind.plots.items():
        if plot.x == "backend":
            _draw_bars(runs, records, plot, folder, name)
        else:
            plot_lines(folder / f"{name}.png", _lines(runs, records, plot), plot.x, plot.y, marker="o")


def _labels(runs: Sequence[FinishedRun], places: Sequence[tuple[str, Hashable]]) -> list[str]:
    """A label for each run. places: its name and where it is drawn. Where runs share a name at one place, what they
    differ in follows: first in words, then by knobs, and last by their folders.
    """
    labels = [name for name, _ in places]
    for tell in (_words, _knobs, _folder):
        shared = [(label, place) for label, (_, place) in zip(labels, places, strict=True)]
        labels = _told_apart(shared, [tell(run) for run in runs])
    return labels


def _told_apart(places: Sequence[tuple[str, Hashable]], words: Sequence[Mapping[str, str]]) -> list[str]:
    """Names, and after each the words of every kind in which some that share a name at one place differ."""
    told = {(place, kind, word) for place, own in zip(places, words, strict=True) for kind, word in own.items()}
    counts = Counter((place, kind) for place, kind, _ in told)
    differing = {kind for (_, kind), count in counts.items() if count > 1}
    return [
        " ".join([name, *(word for kind, word in own.items() if word and kind in differing)])
        for (name, _), own in zip(places, words, strict=True)
    ]


def _words(run: FinishedRun) -> dict[str, str]:
    """What runs of one model and backend mostly differ in."""
    rate, policy = rate_of(run.config), run.config.replica_scheduler.provider
    told = {"policy": policy, "budget": measures.budget_name(run.config), "workload": workload_name(run.config)}
    return told | {"rate": "" if rate is None else f"{rate:g} requests/s"}


def _knobs(run: FinishedRun) -> dict[str, str]:
    """Every knob, as "seed 3"."""
    config = _but_folder(run.config)
    return {knob.path: f"{knob.leaf} {attrgetter(knob.path)(config)}" for knob in knobs_of(BenchmarkConfig)}


def _folder(run: FinishedRun) -> dict[str, str]:
    """The last two parts: a run's own and its parent's."""
    return {"folder": "/".join(run.folder.parts[-2:])}


def _line_name(record: Record) -> str:
    return f"{record['model']} {record['backend']}"


def _lines(runs: Sequence[FinishedRun], records: Sequence[Record], plot: Plot) -> dict[str, Points]:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    labels = _labels(runs, [(_line_name(record), record[plot.x]) for record in records])
    for label, record in zip(labels, records, strict=True):
        if record[plot.x] is not None and record[plot.y] is not None:
            points[label].append((record[plot.x], record[plot.y]))
    return {label: ([x for x, _ in sorted(line)], [y for _, y in sorted(line)]) for label, line in points.items()}


def _draw_bars(runs: Sequence[FinishedRun], records: Sequence[Record], plot: Plot, folder: Path, name: str) -> None:
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    groups_of = [f"{record['model']} {record['workload']}" for record in records]
    labels = _labels(runs, [(record["backend"], group) for record, group in zip(records, groups_of, strict=True)])
    for group, label, record in zip(groups_of, labels, records, strict=True):
        if record[plot.y] is not None:
            groups[group][label] = record[plot.y]
    for group, bars in groups.items():
        word = "".join(letter if letter.isalnum() else "-" for letter in group)
        plot_bars(folder / f"{name}_{word}.png", bars, f"{plot.y}: {group}")
