"""Tables and plots over the runs of an experiment, one kind for each figure. Knows no process.

A row begins with what the run was (columns of IDENTITY), all of it from the saved configuration.
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
from sarathi.benchmark.experiment.collect import FinishedRun
from sarathi.benchmark.experiment.measures import (
    Row,
    between_tokens,
    budget_name,
    decode,
    decode_step_line,
    decode_steps,
    latency,
    makespan,
    prefill,
    token_gap_cdf,
)
from sarathi.config.backend import AUTO, BackendSpec
from sarathi.config.knobs import knobs_of, sections_of
from sarathi.metrics.plots import Points, plot_bars, plot_lines

SUMMARY = "write_metrics"
ROWS = (SUMMARY, "metrics_store.keep_individual_batch_metrics")  # of every step and token
IDENTITY = ("model", "backend", "scheduler", "workload", "qps", "num_requests")


class Plot(NamedTuple):
    """Lines over column x, one for each model, backend and what else differs; bars where x is the backend itself."""

    x: str
    y: str


def is_paged(row: Row) -> bool:
    """Whether the row's backend keeps keys and values in blocks."""
    return bool(BackendSpec.parse(row["backend"]).is_paged)


def is_vllm(row: Row) -> bool:
    """Whether whole prompts went before decodes."""
    return bool(row["scheduler"] == "vllm")


class Score(NamedTuple):
    """A column that rows are compared by, along one of IDENTITY, with the best of those that are a reference."""

    column: str
    more_is_better: bool = False
    along: str = "backend"
    is_reference: Callable[[Row], bool] = is_paged


class RunLines(NamedTuple):
    """A line for each run."""

    line: Callable[[FinishedRun], Points]
    x_label: str
    y_label: str


class TableKind(NamedTuple):
    """measure: what a run adds to its row. plots: by file name. score: what rows are compared by; None: not at all.

    run_lines: a plot with one line a run, by file name. needs: switches, on by default, that write what is read.
    """

    measure: Callable[[FinishedRun], Row]
    plots: Mapping[str, Plot]
    score: Score | None = None
    run_lines: Mapping[str, RunLines] = MappingProxyType({})
    needs: tuple[str, ...] = (SUMMARY,)


def identity(run: FinishedRun) -> Row:
    """What a run was; the number of requests is that of its result, for a trace that is replayed has its own."""
    config = run.config
    return {
        "model": config.model.name,
        "backend": config.model.attention_backend,
        "scheduler": config.replica_scheduler.provider,
        "workload": workload_name(config),
        "qps": rate_of(config),
        "num_requests": run.summary["num_requests"],
    }


def rate_of(config: BenchmarkConfig) -> float | None:
    """Requests a second that were asked for; None where they come all at once, or at the times of a trace."""
    if config.request_generator.provider == "trace":
        return None
    rates = {
        "poisson": config.poisson_request_interval_generator.qps,
        "gamma": config.gamma_request_interval_generator.qps,
    }
    return rates.get(config.synthetic_request_generator.interval_provider)


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


def make_rows(kind: TableKind, runs: Sequence[FinishedRun]) -> list[Row]:
    """One row a run, compared with the reference of the same work."""
    rows = [identity(run) | kind.measure(run) for run in runs]
    if kind.score is None:
        return rows
    work_of = WORKS[kind.score.along]
    return list(compared(rows, [work_of(run.config) for run in runs], kind.score))


def compared(rows: Sequence[Row], works: Sequence[Hashable], score: Score) -> Iterator[Row]:
    """Rows with `reference`, the best one of the same work, and `ratio`: > 1 is better than that one."""
    sign = -1 if score.more_is_better else 1
    best: dict[Hashable, Row] = {}
    for row, work in zip(rows, works, strict=True):
        if row[score.column] is not None and score.is_reference(row):
            best[work] = min(best.get(work, row), row, key=lambda each: sign * each[score.column])
    for row, work in zip(rows, works, strict=True):
        other, own = best.get(work), row[score.column]
        ratio = None if other is None or not own else (other[score.column] / own) ** sign
        yield row | {"reference": None if other is None else other[score.along], "ratio": ratio}


def _but_backend(config: BenchmarkConfig) -> BenchmarkConfig:
    return replace(_but_folder(config), model=replace(config.model, attention_backend=AUTO, block_size=None))


def _but_scheduler(config: BenchmarkConfig) -> BenchmarkConfig:
    """The size of a batch is part of the work, how it is filled is not."""
    size = ReplicaSchedulerConfig(max_batch_size=config.replica_scheduler.max_batch_size)
    none: dict[str, Any] = {
        name: make() for name, make in sections_of(BenchmarkConfig).items() if name.endswith("_scheduler")
    }
    return replace(_but_folder(config), **{**none, "replica_scheduler": size})


def _but_folder(config: BenchmarkConfig) -> BenchmarkConfig:
    """What was run, without where results go and how much is said."""
    return replace(config, output_dir="", log_level="info", show_progress=False)


# Everything that two runs must share to be compared along a column: what the columns do not show, too.
WORKS: Mapping[str, Callable[[BenchmarkConfig], Hashable]] = {"backend": _but_backend, "scheduler": _but_scheduler}


TABLES = {
    "makespan": TableKind(makespan, {"makespan": Plot("backend", "makespan_s")}, Score("makespan_s")),
    "latency": TableKind(latency, {name: Plot("qps", name) for name in ("p50", "p90", "p99")}, Score("p50")),
    "prefill": TableKind(
        prefill,
        {"prefill_throughput": Plot("context", "prefill_tokens_per_s")},
        Score("prefill_tokens_per_s", more_is_better=True),
        needs=ROWS,
    ),
    "decode": TableKind(
        decode,
        {"decode_throughput": Plot("batch_size", "decode_tokens_per_s")},
        Score("decode_tokens_per_s", more_is_better=True),
        needs=ROWS,
    ),
    "decode_steps": TableKind(
        decode_steps, {}, run_lines={"decode_steps": RunLines(decode_step_line, "decode step", "ms")}, needs=ROWS
    ),
    "between_tokens": TableKind(
        between_tokens,
        {},
        Score("tbt_p99", along="scheduler", is_reference=is_vllm),
        {"between_tokens": RunLines(token_gap_cdf, "seconds between tokens", "CDF")},
        needs=ROWS,
    ),
}


def draw(kind: TableKind, runs: Sequence[FinishedRun], rows: Sequence[Row], folder: Path) -> list[Path]:
    """The plots of a kind; one file for each where lines are drawn, one a model and workload where bars are."""
    paths = [folder / f"{name}.png" for name in kind.run_lines]
    for path, (line, x_label, y_label) in zip(paths, kind.run_lines.values(), strict=True):
        labels = _labels(runs, [(_line_name(row), "") for row in rows])
        plot_lines(path, {label: line(run) for label, run in zip(labels, runs, strict=True)}, x_label, y_label)
    for name, plot in kind.plots.items():
        if plot.x == "backend":
            paths += _draw_bars(runs, rows, plot, folder, name)
        else:
            paths.append(folder / f"{name}.png")
            plot_lines(paths[-1], _lines(runs, rows, plot), plot.x, plot.y, marker="o")
    return paths


def _labels(runs: Sequence[FinishedRun], places: Sequence[tuple[str, Hashable]]) -> list[str]:
    """A label for each run. places: its name and where it is drawn; after the name stands what runs that share it at
    one place differ in: in words as far as those tell, then by knobs, and runs of the same knobs by their folders.
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
    rate = rate_of(run.config)
    return {
        "policy": run.config.replica_scheduler.provider,
        "budget": budget_name(run.config),
        "workload": workload_name(run.config),
        "rate": "" if rate is None else f"{rate:g} requests/s",
    }


def _knobs(run: FinishedRun) -> dict[str, str]:
    """Every knob, as "seed 3"."""
    config = _but_folder(run.config)
    return {knob.path: f"{knob.leaf} {attrgetter(knob.path)(config)}" for knob in knobs_of(BenchmarkConfig)}


def _folder(run: FinishedRun) -> dict[str, str]:
    """The last two parts: a run's own and what it was written below."""
    return {"folder": "/".join(run.folder.parts[-2:])}


def _line_name(row: Row) -> str:
    return f"{row['model']} {row['backend']}"


def _lines(runs: Sequence[FinishedRun], rows: Sequence[Row], plot: Plot) -> dict[str, Points]:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    labels = _labels(runs, [(_line_name(row), row[plot.x]) for row in rows])
    for label, row in zip(labels, rows, strict=True):
        if row[plot.x] is not None and row[plot.y] is not None:
            points[label].append((row[plot.x], row[plot.y]))
    return {label: ([x for x, _ in sorted(line)], [y for _, y in sorted(line)]) for label, line in points.items()}


def _draw_bars(runs: Sequence[FinishedRun], rows: Sequence[Row], plot: Plot, folder: Path, name: str) -> list[Path]:
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    groups_of = [f"{row['model']} {row['workload']}" for row in rows]
    labels = _labels(runs, [(row["backend"], group) for row, group in zip(rows, groups_of, strict=True)])
    for group, label, row in zip(groups_of, labels, rows, strict=True):
        if row[plot.y] is not None:
            groups[group][label] = row[plot.y]
    paths = []
    for group, bars in groups.items():
        word = "".join(letter if letter.isalnum() else "-" for letter in group)
        paths.append(folder / f"{name}_{word}.png")
        plot_bars(paths[-1], bars, f"{plot.y}: {group}")
    return paths
