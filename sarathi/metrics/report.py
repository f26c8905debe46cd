"""The report of a run: HTML page, CSV tables, JSON summary, trace, distributions and time series.

summary.json  report.html  chrome_trace.json  schedule.jsonl
replica_0/  sequence_metrics.csv  batch_metrics.csv  token_metrics.csv  allocator_metrics.csv  memory_metrics.csv
            operation_metrics.csv  cpu_operation_metrics.csv
replica_0/plots/  <metric>.csv  <series>_time_series.csv  decode_token_execution_plus_preemption_time_list.csv

Scripts of Sarathi-Serve and vAttention search a folder tree for tables by file name and read the run's name from the
path before replica_0. Therefore replica_0/ holds the merged tables of all replicas, and no other folder has tables.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sarathi.messages import MemoryStats
from sarathi.metrics import plots
from sarathi.metrics.environment import environment
from sarathi.metrics.files import PART_SUFFIX, is_file_name, open_replacing, write_columns, write_json, write_table
from sarathi.metrics.records import RunRecords
from sarathi.metrics.report_page import report_page
from sarathi.metrics.tables import (
    REQUEST_ID,
    TIME,
    TIME_SERIES,
    TOKEN_LIST,
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
)  # fmt: skip
from sarathi.metrics.trace import num_trace_events, trace_events

SUMMARY_FILE = "summary.json"
PAGE_FILE = "report.html"
TABLES_FOLDER = "replica_0"
TRACE_FILE = "chrome_trace.json"
MAX_TRACE_EVENTS = 200_000  # about 30 MB
TABLES = (
    "sequence_metrics", "batch_metrics", "token_metrics", "allocator_metrics", "memory_metrics", "operation_metrics",
    "cpu_operation_metrics",
)  # fmt: skip
FILES = (*[f"{TABLES_FOLDER}/{name}.csv" for name in TABLES], SUMMARY_FILE, PAGE_FILE, TRACE_FILE, "schedule.jsonl")
ALLOCATOR_COLUMNS = (REQUEST_ID, "request_num_prefill_tokens", "kv_blocks_mapped", "kv_fragmentation_percent")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportOptions:
    """Optional parts of the report.

    plots: report.html. chrome_trace: None: only for runs of at most MAX_TRACE_EVENTS events. individual_batches: a line
    for each step and each token. operations, cpu_operations: operation times. config: saved in the summary.
    """

    plots: bool = True
    chrome_trace: bool | None = None
    individual_batches: bool = True
    operations: bool = False
    cpu_operations: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


def remove_report(folder: Path) -> None:
    """Remove the files of an earlier report.

    Safe to interrupt: the summary is renamed first and deleted last, so the next call removes the rest.
    """
    listing = folder / (SUMMARY_FILE + PART_SUFFIX)
    with suppress(FileNotFoundError):
        os.replace(folder / SUMMARY_FILE, listing)
    plotted = [plots_folder(folder) / f"{name}.csv" for name in _listed_metrics(listing)]
    for path in (*plotted, *[folder / name for name in FILES if name != SUMMARY_FILE], listing):
        path.with_name(path.name + PART_SUFFIX).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def plots_folder(folder: Path) -> Path:
    """The folder of a report's distributions and time series."""
    return folder / TABLES_FOLDER / "plots"


def _listed_metrics(summary: Path) -> set[str]:
    """Names of the files in plots/. The summary is untrusted: names with path separators are ignored."""
    names: set[object] = set()
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        names = set(json.loads(summary.read_text(encoding="utf-8"))["metrics"])
    return {TOKEN_LIST, *map(_series_file, TIME_SERIES), *[str(name) for name in names if is_file_name(name)]}


def write_report(
    records: RunRecords, folder: Path, options: ReportOptions, status: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the report into `folder`, created if necessary; returns the summary, which includes `status`.

    Remove an earlier report first. The summary is written last: a folder with a summary is complete.
    """
    plots_folder(folder).mkdir(parents=True, exist_ok=True)
    summary = summarize(records) | {"environment": environment(), "config": dict(options.config)} | dict(status or {})
    listing = folder / (SUMMARY_FILE + PART_SUFFIX)
    write_json(listing, summary)
    for name, table in _tables(records, options):
        write_table(folder / TABLES_FOLDER / f"{name}.csv", table)
    _write_schedule(records, folder)
    _write_trace(records, folder, options.chrome_trace)
    _write_plotted(records, plots_folder(folder), options)
    if options.plots and plots.is_available():
        with open_replacing(folder / PAGE_FILE) as file:
            file.write(report_page(records, summary))
    os.replace(listing, folder / SUMMARY_FILE)
    return summary


def summarize(records: RunRecords) -> dict[str, Any]:
    """Counts, rates over the whole duration, and quantiles, as JSON values."""
    complete = [record for record in records.requests if record.is_complete]
    prompt = sum(record.num_prompt_tokens for record in records.requests if record.first_token_at_s is not None)
    output = sum(record.request_num_decode_tokens for record in records.requests)
    duration_s = records.duration_s
    rates = {"requests": len(complete), "prefill_tokens": prompt, "decode_tokens": output, "tokens": prompt + output}
    return {
        "num_requests": len(records.requests),
        "num_completed": len(complete),
        "num_steps": len(records.steps),
        "num_prefill_tokens": prompt,
        "num_decode_tokens": output,
        "duration_s": duration_s,
        "throughput": {f"{name}_per_s": count / duration_s if duration_s > 0 else 0.0 for name, count in rates.items()},
        "memory": _memory_summary(records),
        "metrics": {name: describe(values) for name, values in distributions(records).items()},
    }


def _memory_summary(records: RunRecords) -> dict[str, float]:
    """Peaks since the engines' start, and increments of the counters during the run, summed over replicas."""
    last = {sample.replica: sample.stats for sample in records.memory}.values()
    first = {sample.replica: sample.stats for sample in reversed(records.memory)}.values()
    return {
        **{name: _sum(last, name) for name in ("reserved_bytes", "created_bytes", "peak_mapped_bytes")},
        "max_wasted_bytes": max((sample.stats.wasted_bytes for sample in records.memory), default=0),
        **{name: _sum(last, name) - _sum(first, name) for name in ("driver_calls", "driver_s", "steps_waited")},
    }


def _sum(samples: Iterable[MemoryStats], name: str) -> float:
    return sum([float(getattr(stats, name)) for stats in samples])


def _tables(records: RunRecords, options: ReportOptions) -> Iterable[tuple[str, Table]]:
    requests = request_table(records)
    yield "sequence_metrics", requests
    yield "allocator_metrics", Table(ALLOCATOR_COLUMNS, requests.records)
    if options.individual_batches:
        yield "batch_metrics", batch_table(records)
        yield "token_metrics", token_table(records)
    if records.memory:
        yield "memory_metrics", memory_table(records)
    if options.operations:
        yield "operation_metrics", operation_table(records, on_device=True)
    if options.cpu_operations:
        yield "cpu_operation_metrics", operation_table(records, on_device=False)


def _write_plotted(records: RunRecords, folder: Path, options: ReportOptions) -> None:
    """Write each distribution as a CDF, each time series as running totals, and every gap between tokens."""
    for name, values in distributions(records).items():
        write_columns(folder / f"{name}.csv", (name, "cdf"), zip(*cdf(values), strict=True))
    for name, points in time_series(records).items():
        write_columns(folder / f"{_series_file(name)}.csv", (TIME, name), points)
    if options.individual_batches:
        write_table(folder / f"{TOKEN_LIST}.csv", token_table(records))


def _series_file(name: str) -> str:
    """Sarathi-Serve's file name of a time series."""
    return f"{name}_time_series"


def _write_schedule(records: RunRecords, folder: Path) -> None:
    """Write one line for each step: its requests and their tokens. Nothing if the schedule was not recorded."""
    if not records.schedule:
        return
    with open_replacing(folder / "schedule.jsonl") as file:
        for step in records.schedule:
            chunks = [[chunk.request_id, chunk.start, chunk.num_tokens] for chunk in step.chunks]
            line = {"replica": step.replica, "step": step.step_id, "chunks": chunks, "preempted": step.preempted}
            file.write(json.dumps(line) + "\n")


def _write_trace(records: RunRecords, folder: Path, wanted: bool | None) -> None:
    num_events = num_trace_events(records)
    if wanted is None and num_events > MAX_TRACE_EVENTS:
        logger.warning(
            "%s is not written: it would have about %d events, and more than %d have to be asked for",
            TRACE_FILE, num_events, MAX_TRACE_EVENTS,
        )  # fmt: skip
    elif wanted is not False:
        with open_replacing(folder / TRACE_FILE) as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            for number, event in enumerate(trace_events(records)):
                file.write((",\n" if number else "\n") + json.dumps(event))
            file.write("\n]}\n")
