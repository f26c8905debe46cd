"""Tables, distributions and time series computed from records, under the names of Sarathi-Serve's metrics store.

Units are Sarathi-Serve's: milliseconds for operations, else seconds; `kv_*_bytes` are bytes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sarathi.metrics.records import MemoryRecord, OperationRecord, RunRecords, StepRecord
from sarathi.metrics.request_record import RequestRecord

REQUEST_ID, BATCH_ID, TOKEN_ID, TIME = "Request Id", "Batch Id", "Decode Token Id", "Time (sec)"
REQUEST_TIMES = (
    "request_e2e_time",
    "request_e2e_time_normalized",
    "request_e2e_time_piecewise_normalized",
    "request_execution_time",
    "request_execution_time_normalized",
    "request_preemption_time",
    "request_scheduling_delay",
    "request_execution_plus_preemption_time",
    "request_execution_plus_preemption_time_normalized",
    "prefill_e2e_time",
    "prefill_e2e_time_normalized",
    "prefill_e2e_time_piecewise_normalized",
    "prefill_time_execution_plus_preemption",
    "prefill_time_execution_plus_preemption_normalized",
    "decode_time_execution_plus_preemption_normalized",
)
REQUEST_COUNTS = (
    "request_inter_arrival_delay",
    "request_num_tokens",
    "request_num_prefill_tokens",
    "request_num_decode_tokens",
    "request_pd_ratio",
    "request_num_restarts",
    "request_num_pauses",
    "request_num_ignored",
    "kv_blocks_mapped",
    "kv_fragmentation_percent",
)
ARRIVAL_COUNTS = ("request_inter_arrival_delay", "request_num_ignored")
BATCH_COUNTS = ("batch_num_tokens", "batch_num_prefill_tokens", "batch_num_decode_tokens", "batch_size")
BATCH_TIMES = ("batch_execution_time", "inter_batch_delay")
TOKEN_TIME = "decode_token_execution_plus_preemption_time"
TOKEN_LIST = f"{TOKEN_TIME}_list"
COMPUTING = "model_execution_e2e"
CPU_OPERATIONS = ("schedule", COMPUTING, "process_model_outputs")
HOST_OPERATIONS = ("prepare_inputs", "sample")  # parts of COMPUTING
MEMORY_BYTES = ("kv_created_bytes", "kv_mapped_bytes", "kv_wasted_bytes", "kv_idle_bytes")
MEMORY_COUNTS = (*MEMORY_BYTES, "kv_mapping_time", "kv_steps_waited")
PAGES = "kv_pages_mapped"
TIME_SERIES = ("request_arrival", "request_completion", "prefill_completion", "decode_completion")


@dataclass(frozen=True)
class Table:
    """Columns and lines of a CSV file; a missing or None value is an empty cell."""

    columns: tuple[str, ...]
    records: list[dict[str, Any]]

    def values(self, column: str) -> list[float]:
        return [cells[column] for cells in self.records if cells.get(column) is not None]


def request_table(records: RunRecords) -> Table:
    """One record for each request that has ended.

    Complete requests have times, started requests counts. A request that never started has its arrival alone and
    counts as ignored, as in Sarathi-Serve: it does not skew the distributions.
    """
    ended = [record for record in records.requests if record.closed_at_s is not None]
    return Table((REQUEST_ID, *REQUEST_TIMES, *REQUEST_COUNTS), [_request_row(record) for record in ended])


def _request_row(record: RequestRecord) -> dict[str, Any]:
    times = REQUEST_TIMES if record.is_complete else ()
    counts = ARRIVAL_COUNTS if record.scheduled_at_s is None else REQUEST_COUNTS
    return {REQUEST_ID: record.request_id} | {name: getattr(record, name) for name in (*times, *counts)}


def batch_table(records: RunRecords) -> Table:
    """One record for each step."""
    last_end: dict[int, float] = {}
    table = Table((BATCH_ID, *BATCH_COUNTS, *BATCH_TIMES), [])
    for step in records.steps:
        values = (step.num_tokens, step.num_prefill_tokens, step.num_decode_tokens, step.batch_size, step.duration_s)
        delay_s = step.busy_from_s - last_end.get(step.replica, step.busy_from_s)
        first = step.replica not in last_end
        cells = dict(zip(table.columns, (_batch_id(step), *values, None if first else delay_s), strict=True))
        table.records.append(cells)
        last_end[step.replica] = step.times.ended_at_s
    return table


def _batch_id(record: StepRecord | OperationRecord | MemoryRecord) -> int | str:
    return record.step_id if record.replica == 0 else f"{record.replica}_{record.step_id}"


def token_table(records: RunRecords) -> Table:
    """One record for each token but the first of a request: seconds since the previous token."""
    table = Table((TOKEN_ID, TOKEN_LIST), [])
    for record in records.requests:
        for index, gap_s in enumerate(record.token_gaps_s, start=1):
            table.records.append({TOKEN_ID: f"{record.request_id}_{index}", TOKEN_LIST: gap_s})
    return table


def operation_table(records: RunRecords, on_device: bool) -> Table:
    """Milliseconds of each operation in each step; one column for each operation."""
    by_step: dict[int | str, dict[str, Any]] = {}
    names: list[str] = []
    if not on_device:
        names += (*CPU_OPERATIONS, *HOST_OPERATIONS)
        by_step.update((_batch_id(step), _cpu_times_ms(step)) for step in records.steps)
    for operation in records.operations:
        if operation.on_device == on_device:
            cells = by_step.setdefault(_batch_id(operation), {})
            cells[operation.name] = cells.get(operation.name, 0.0) + 1e3 * operation.duration_s
            names.append(operation.name)
    return Table((BATCH_ID, *dict.fromkeys(names)), [{BATCH_ID: step} | cells for step, cells in by_step.items()])


def _cpu_times_ms(step: StepRecord) -> dict[str, Any]:
    seconds = {name: after - before for name, (before, after) in cpu_spans(step).items()}
    if step.host is not None:
        seconds |= dict(zip(HOST_OPERATIONS, step.host, strict=True))
    return {name: 1e3 * each for name, each in seconds.items()}


def cpu_spans(step: StepRecord) -> dict[str, tuple[float, float]]:
    """Start and end of each phase of a step, in seconds. Computing starts when the previous step ends."""
    times = step.times
    computing = (step.computing_from_s, times.executed_at_s)
    spans = ((times.started_at_s, times.scheduled_at_s), computing, (times.executed_at_s, times.ended_at_s))
    return dict(zip(CPU_OPERATIONS, spans, strict=True))


def memory_table(records: RunRecords) -> Table:
    """One record for each memory sample. kv_mapping_time and kv_steps_waited are increments since the last sample."""
    pages = (PAGES,) if records.page_bytes else ()
    table = Table((BATCH_ID, TIME, *pages, *MEMORY_COUNTS), [])
    last: dict[int, MemoryRecord] = {}
    for sample in records.memory:
        before, stats = last.get(sample.replica, sample).stats, sample.stats
        cells = {BATCH_ID: _batch_id(sample), TIME: sample.at_s - records.origin_s}
        cells |= {name: getattr(stats, name.removeprefix("kv_")) for name in MEMORY_BYTES}
        cells |= {"kv_mapping_time": stats.driver_s - before.driver_s}
        cells |= {"kv_steps_waited": stats.steps_waited - before.steps_waited}
        cells |= {name: stats.mapped_bytes // records.page_bytes for name in pages if records.page_bytes}
        table.records.append(cells)
        last[sample.replica] = sample
    return table


def distributions(records: RunRecords) -> dict[str, list[float]]:
    """The values of every metric by name; metrics without values are left out."""
    found = {}
    for table, names in (
        (request_table(records), (*REQUEST_TIMES, *REQUEST_COUNTS)),
        (batch_table(records), (*BATCH_COUNTS, *BATCH_TIMES)),
        (memory_table(records), (PAGES, *MEMORY_COUNTS)),
    ):
        found.update({name: table.values(name) for name in names})
    found[TOKEN_TIME] = [gap for record in records.requests for gap in record.token_gaps_s]
    for on_device in (False, True):
        table = operation_table(records, on_device)
        found.update({f"{name}_execution_time": table.values(name) for name in table.columns[1:]})
    return {name: values for name, values in found.items() if values}


def time_series(records: RunRecords) -> dict[str, list[tuple[float, float]]]:
    """Cumulative requests, prompt tokens and output tokens over time, as (seconds since time zero, total).

    Requests that were cut off, aborted or refused count as arrivals, not as completions.
    """
    arrivals, completions, prefills, decodes = events = [list[tuple[float, float]]() for _ in TIME_SERIES]
    for record in records.requests:
        arrivals.append((record.arrived_at_s, 1))
        if record.is_complete and record.finished_at_s is not None:
            completions.append((record.finished_at_s, 1))
        if record.first_token_at_s is not None:
            prefills.append((record.first_token_at_s, record.num_prompt_tokens))
        decodes += [(at_s, 1) for at_s in record.token_times_s]
    named = zip(TIME_SERIES, events, strict=True)
    return {name: _running_total(points, records.origin_s) for name, points in named if points}


def _running_total(points: list[tuple[float, float]], origin_s: float) -> list[tuple[float, float]]:
    points.sort()
    totals = np.cumsum([value for _, value in points]).tolist()
    return [(at_s - origin_s, total) for (at_s, _), total in zip(points, totals, strict=True)]


def cdf(values: Iterable[float]) -> tuple[list[float], list[float]]:
    """The empirical CDF: sorted values, and for each the fraction of values <= it."""
    ordered = sorted(values)
    return ordered, [(index + 1) / len(ordered) for index in range(len(ordered))]


QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def describe(values: Sequence[float]) -> dict[str, float]:
    """Count, sum, mean, standard deviation, minimum, maximum, and quantiles (linear interpolation)."""
    data = np.asarray(values, dtype=float)
    summary = {"count": len(values), "sum": data.sum(), "mean": data.mean(), "std": data.std(), "min": data.min()}
    summary |= {"max": data.max()}
    summary |= {f"p{100 * q:g}": value for q, value in zip(QUANTILES, np.quantile(data, QUANTILES), strict=True)}
    return {name: float(value) for name, value in summary.items()}
