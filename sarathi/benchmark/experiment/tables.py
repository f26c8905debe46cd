"""Tables and plots over the runs of an experiment, one kind for each figure. Knows no process.

A row begins with what the run was (columns of IDENTITY), all of it from the saved configuration.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.experiment.collect import FinishedRun
from sarathi.config.backend import AUTO, BackendSpec
from sarathi.metrics.plots import Points, plot_bars, plot_lines

Row = dict[str, Any]
IDENTITY = ("model", "backend", "scheduler", "workload", "qps", "num_requests")


class Plot(NamedTuple):
    """Lines over column x, one for each model and backend; bars where x is the backend itself."""

    x: str
    y: str


class Score(NamedTuple):
    """A column, and whether more of it is better."""

    column: str
    more_is_better: bool


class TableKind(NamedTuple):
    """measure: what a run adds to its row. plots: by file name. score: what backends are compared by, None: nothing."""

    measure: Callable[[FinishedRun], Row]
    plots: Mapping[str, Plot]
    score: Score | None = None


def identity(config: BenchmarkConfig) -> Row:
    """What a run was."""
    synthetic = config.synthetic_request_generator
    rates = {
        "poisson": config.poisson_request_interval_generator.qps,
        "gamma": config.gamma_request_interval_generator.qps,
    }
    return {
        "model": config.model.name,
        "backend": config.model.attention_backend,
        "scheduler": config.replica_scheduler.provider,
        "workload": workload_name(config),
        "qps": rates.get(synthetic.interval_provider),
        "num_requests": synthetic.num_requests,
    }


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
    """One row a run, compared with the best paged backend of the same work."""
    rows = [identity(run.config) | kind.measure(run) for run in runs]
    return rows if kind.score is None else list(compared(rows, kind.score))


def compared(rows: Sequence[Row], score: Score) -> Iterator[Row]:
    """Rows with `reference`, the best paged backend of the same work, and `ratio`: > 1 is better than that one."""
    sign = -1 if score.more_is_better else 1
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row[score.column] is not None and _is_paged(row["backend"]):
            best[_work(row)] = min(best.get(_work(row), row), row, key=lambda each: sign * each[score.column])
    for row in rows:
        other, own = best.get(_work(row)), row[score.column]
        ratio = None if other is None or not own else (other[score.column] / own) ** sign
        yield row | {"reference": None if other is None else other["backend"], "ratio": ratio}


def _is_paged(backend: str) -> bool:
    return backend != AUTO and BackendSpec.parse(backend).is_paged


def _work(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY if name != "backend")


def makespan(run: FinishedRun) -> Row:
    """All requests arrive at time zero, so the last one's end is the makespan."""
    seconds = run.quantile("request_e2e_time", "max")
    count = run.summary["num_completed"]
    rate = 60 * count / seconds if seconds else None
    return {"makespan_s": seconds, "requests_per_minute": rate}


def latency(run: FinishedRun) -> Row:
    """Normalized latency: seconds from arrival to end, for each output token."""
    row: Row = {key: run.quantile("request_e2e_time_normalized", key) for key in ("p50", "p90", "p99")}
    row |= {f"ttft_{key}": run.quantile("prefill_e2e_time", key) for key in ("p50", "p99")}
    gaps = "decode_token_execution_plus_preemption_time"
    return row | {"tbt_p99": run.quantile(gaps, "p99"), "duration_s": run.summary["duration_s"]}


def prefill(run: FinishedRun) -> Row:
    """Prompt tokens a second over steps that hold nothing else."""
    steps = [step for step in run.table("batch_metrics") if not step["batch_num_decode_tokens"]]
    tokens, seconds = _total(steps, "batch_num_prefill_tokens"), _total(steps, "batch_execution_time")
    context = run.config.uniform_request_length_generator.max_tokens
    return {"context": context, "prefill_tokens_per_s": tokens / seconds if seconds else None}


def decode(run: FinishedRun) -> Row:
    """Tokens a second over steps in which every slot of the batch decodes, and the cache that they fill."""
    size = run.config.replica_scheduler.max_batch_size
    steps = [
        step
        for step in run.table("batch_metrics")
        if step["batch_num_decode_tokens"] == step["batch_num_tokens"] == size
    ]
    seconds = _total(steps, "batch_execution_time")
    rate = size * len(steps) / seconds if seconds else None
    row: Row = {"batch_size": size, "num_steps": len(steps), "decode_tokens_per_s": rate}
    median_s = float(np.median([step["batch_execution_time"] or 0.0 for step in steps])) if steps else None
    return row | {"median_step_ms": None if median_s is None else 1e3 * median_s}


def decode_steps(run: FinishedRun) -> Row:
    """How long decode steps take, and how often one waited for pages."""
    times = decode_step_times_ms(run)
    quantiles = np.quantile(times, [0.5, 0.9, 0.99, 1.0]).tolist() if times else [None] * 4
    row: Row = dict(zip(("p50_ms", "p90_ms", "p99_ms", "max_ms"), quantiles, strict=True))
    memory = run.summary["memory"]
    return row | {"num_steps": len(times), "steps_waited": memory["steps_waited"], "mapping_s": memory["driver_s"]}


def decode_step_times_ms(run: FinishedRun) -> list[float]:
    """Durations of steps without prefill, in order."""
    steps = run.table("batch_metrics")
    return [1e3 * (step["batch_execution_time"] or 0.0) for step in steps if not step["batch_num_prefill_tokens"]]


TABLES = {
    "makespan": TableKind(makespan, {"makespan": Plot("backend", "makespan_s")}, Score("makespan_s", False)),
    "latency": TableKind(latency, {name: Plot("qps", name) for name in ("p50", "p90", "p99")}, Score("p50", False)),
    "prefill": TableKind(
        prefill, {"prefill_throughput": Plot("context", "prefill_tokens_per_s")}, Score("prefill_tokens_per_s", True)
    ),
    "decode": TableKind(
        decode, {"decode_throughput": Plot("batch_size", "decode_tokens_per_s")}, Score("decode_tokens_per_s", True)
    ),
    "decode_steps": TableKind(decode_steps, {}),
}


def draw(kind: TableKind, rows: Sequence[Row], folder: Path) -> list[Path]:
    """The plots of a kind; one file for each where lines are drawn, one a model and workload where bars are."""
    paths = []
    for name, plot in kind.plots.items():
        if plot.x == "backend":
            paths += _draw_bars(rows, plot, folder, name)
        else:
            paths.append(folder / f"{name}.png")
            plot_lines(paths[-1], _lines(rows, plot), plot.x, plot.y, marker="o")
    return paths


def draw_decode_steps(runs: Sequence[FinishedRun], path: Path) -> None:
    """The latency of every decode step, one line a run."""
    lines: dict[str, Points] = {}
    for run in runs:
        times = decode_step_times_ms(run)
        lines[f"{run.config.model.name} {run.config.model.attention_backend}"] = (range(len(times)), times)
    plot_lines(path, lines, "decode step", "ms")


def _lines(rows: Sequence[Row], plot: Plot) -> dict[str, Points]:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row[plot.x] is not None and row[plot.y] is not None:
            points[f"{row['model']} {row['backend']}"].append((row[plot.x], row[plot.y]))
    return {label: ([x for x, _ in sorted(line)], [y for _, y in sorted(line)]) for label, line in points.items()}


def _draw_bars(rows: Sequence[Row], plot: Plot, folder: Path, name: str) -> list[Path]:
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row[plot.y] is not None:
            groups[f"{row['model']} {row['workload']}"][row["backend"]] = row[plot.y]
    paths = []
    for group, bars in groups.items():
        word = "".join(letter if letter.isalnum() else "-" for letter in group)
        paths.append(folder / f"{name}_{word}.png")
        plot_bars(paths[-1], bars, f"{plot.y}: {group}")
    return paths


def _total(steps: Sequence[Mapping[str, float | None]], column: str) -> float:
    return sum(step[column] or 0.0 for step in steps)
