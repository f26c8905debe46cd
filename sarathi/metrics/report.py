"""Files of a result: CSV tables, a JSON summary, a trace, CDFs and series as CSV and PNG. Knows no engine.

sequence_metrics.csv  batch_metrics.csv  token_metrics.csv  allocator_metrics.csv  memory_metrics.csv
operation_metrics.csv  cpu_operation_metrics.csv  summary.json  chrome_trace.json  schedule.jsonl
plots/<metric>.csv  plots/<metric>.png
"""

import csv
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sarathi.messages import MemoryStats
from sarathi.metrics import plots
from sarathi.metrics.environment import environment
from sarathi.metrics.records import RunRows
from sarathi.metrics.tables import (
    REQUEST_ID,
    TIME,
    TIME_SERIES,
    Table,
    batch_table,
    cdf,
    describe,
    distributions,
    memory_table,
    operation_table,
    request_table,
    time_series,
    token_table,
)
from sarathi.metrics.trace import chrome_trace

SUMMARY_FILE = "summary.json"
TABLES = (
    "sequence_metrics",
    "batch_metrics",
    "token_metrics",
    "allocator_metrics",
    "memory_metrics",
    "operation_metrics",
    "cpu_operation_metrics",
)
FILES = (*[f"{name}.csv" for name in TABLES], SUMMARY_FILE, "chrome_trace.json", "schedule.jsonl")
ALLOCATOR_COLUMNS = (REQUEST_ID, "request_num_prefill_tokens", "kv_blocks_mapped", "kv_fragmentation_percent")


@dataclass(frozen=True)
class ReportOptions:
    """What is written. individual_batches: one row a step and a token, beside the distributions.

    operations, cpu_operations: times of operations. config: what was run, saved with the summary.
    """

    plots: bool = True
    chrome_trace: bool = True
    individual_batches: bool = True
    operations: bool = False
    cpu_operations: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


def remove_report(folder: Path) -> None:
    """The files of a report that was written here before, and no others."""
    names = set(TIME_SERIES)
    with suppress(OSError, ValueError, LookupError, TypeError):
        names |= set(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))["metrics"])
    plotted = [folder / "plots" / f"{name}.{kind}" for name in names for kind in ("csv", "png")]
    for path in (*[folder / name for name in FILES], *plotted):
        path.unlink(missing_ok=True)


def write_report(rows: RunRows, folder: Path, options: ReportOptions) -> dict[str, Any]:
    """Writes the files into `folder`, which is made if need be; returns the summary."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    summary = summarize(rows) | {"environment": environment(), "config": dict(options.config)}
    write_json(folder / SUMMARY_FILE, summary)
    for name, table in _tables(rows, options):
        write_table(folder / f"{name}.csv", table)
    _write_schedule(rows, folder)
    if options.chrome_trace:
        (folder / "chrome_trace.json").write_text(json.dumps(chrome_trace(rows)))
    plot = options.plots and plots.is_available()
    _write_distributions(rows, folder / "plots", plot)
    _write_series(rows, folder / "plots", plot)
    return summary


def summarize(rows: RunRows) -> dict[str, Any]:
    """Counts, rates and quantiles of everything; rates are over the whole duration, as JSON values."""
    complete = [record for record in rows.requests if record.is_complete]
    prompt = sum(record.num_prompt_tokens for record in rows.requests if record.first_token_at_s is not None)
    output = sum(record.request_num_decode_tokens for record in rows.requests)
    duration_s = rows.duration_s
    rates = {"requests": len(complete), "prefill_tokens": prompt, "decode_tokens": output, "tokens": prompt + output}
    return {
        "num_requests": len(rows.requests),
        "num_completed": len(complete),
        "num_steps": len(rows.steps),
        "num_prefill_tokens": prompt,
        "num_decode_tokens": output,
        "duration_s": duration_s,
        "throughput": {f"{name}_per_s": count / duration_s if duration_s > 0 else 0.0 for name, count in rates.items()},
        "memory": _memory_summary(rows),
        "metrics": {name: describe(values) for name, values in distributions(rows).items()},
    }


def _memory_summary(rows: RunRows) -> dict[str, float]:
    """The cache at its fullest since its engine began, and what its counters rose by, over all replicas."""
    last = {sample.replica: sample.stats for sample in rows.memory}.values()
    first = {sample.replica: sample.stats for sample in reversed(rows.memory)}.values()
    return {
        **{name: _sum(last, name) for name in ("reserved_bytes", "created_bytes", "peak_mapped_bytes")},
        "max_wasted_bytes": max((sample.stats.wasted_bytes for sample in rows.memory), default=0),
        **{name: _sum(last, name) - _sum(first, name) for name in ("driver_calls", "driver_s", "steps_waited")},
    }


def _sum(samples: Iterable[MemoryStats], name: str) -> float:
    return sum([float(getattr(stats, name)) for stats in samples])


def _tables(rows: RunRows, options: ReportOptions) -> Iterable[tuple[str, Table]]:
    requests = request_table(rows)
    yield "sequence_metrics", requests
    yield "allocator_metrics", Table(ALLOCATOR_COLUMNS, requests.rows)
    if options.individual_batches:
        yield "batch_metrics", batch_table(rows)
        yield "token_metrics", token_table(rows)
    if rows.memory:
        yield "memory_metrics", memory_table(rows)
    if options.operations:
        yield "operation_metrics", operation_table(rows, on_device=True)
    if options.cpu_operations:
        yield "cpu_operation_metrics", operation_table(rows, on_device=False)


def _write_distributions(rows: RunRows, folder: Path, plot: bool) -> None:
    for name, values in distributions(rows).items():
        write_columns(folder / f"{name}.csv", (name, "cdf"), zip(*cdf(values), strict=True))
        if plot:
            plots.plot_cdf(folder / f"{name}.png", name, values)


def _write_series(rows: RunRows, folder: Path, plot: bool) -> None:
    for name, points in time_series(rows).items():
        write_columns(folder / f"{name}.csv", (TIME, name), points)
        if plot:
            xs, ys = zip(*points, strict=True)
            plots.plot_lines(folder / f"{name}.png", {name: (xs, ys)}, TIME, name)


def _write_schedule(rows: RunRows, folder: Path) -> None:
    """One line a step: who was in it, with how many tokens; only where the schedule was kept."""
    if not rows.schedule:
        return
    with open(folder / "schedule.jsonl", "w", encoding="utf-8") as file:
        for step in rows.schedule:
            chunks = [[chunk.request_id, chunk.start, chunk.num_tokens] for chunk in step.chunks]
            line = {"replica": step.replica, "step": step.step_id, "chunks": chunks, "preempted": step.preempted}
            file.write(json.dumps(line) + "\n")


def write_table(path: Path, table: Table) -> None:
    """A CSV file with a line of names; None is an empty cell, columns that the table does not name are left out."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.rows)


def write_columns(path: Path, names: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    """A CSV file of plain lines under a line of names."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON; paths and other objects as text."""
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
