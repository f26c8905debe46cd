"""Trace of a run for Perfetto and chrome://tracing: steps, operations, page mapping and requests.

Format: complete ("X"), counter ("C") and metadata ("M") events of the Trace Event Format; times in microseconds since
time zero. Each replica is a process with threads for steps, operations on the device and mapping; another process has a
thread for each request.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from sarathi.metrics.records import RunRows, StepRecord
from sarathi.metrics.request_record import RequestRecord
from sarathi.metrics.tables import COMPUTING, cpu_spans, memory_table

STEPS, PARTS, OPERATIONS, MAPPER = range(4)
THREADS = {STEPS: "steps", PARTS: "between steps", OPERATIONS: "operations", MAPPER: "mapping"}
REQUESTS_PID = 1_000_000

Event = dict[str, Any]


def trace_events(rows: RunRows) -> Iterator[Event]:
    """Every event of the trace."""
    for part in (_names, _steps, _operations, _mapping, _requests):
        yield from part(rows)


def num_trace_events(rows: RunRows) -> int:
    """About how many events the trace has; each takes about 150 bytes."""
    return 5 * len(rows.steps) + len(rows.operations) + 2 * len(rows.memory) + 4 * len(rows.requests)


def _names(rows: RunRows) -> Iterator[Event]:
    for replica in sorted({step.replica for step in rows.steps}):
        yield _metadata("process_name", replica, 0, f"replica {replica}")
        for thread, name in THREADS.items():
            yield _metadata("thread_name", replica, thread, name)
    yield _metadata("process_name", REQUESTS_PID, 0, "requests")
    for index, record in enumerate(rows.requests):
        yield _metadata("thread_name", REQUESTS_PID, index, f"request {record.request_id}")


def _steps(rows: RunRows) -> Iterator[Event]:
    for step in rows.steps:
        start_us, duration_us = _span(rows, step.busy_from_s, step.times.ended_at_s)
        yield _complete(f"step {step.step_id}", step.replica, STEPS, start_us, duration_us) | {"args": _step_args(step)}
        for name, (before, after) in cpu_spans(step).items():
            thread = STEPS if name == COMPUTING else PARTS
            yield _complete(name, step.replica, thread, *_span(rows, before, after))
        yield _counter("tokens of a step", step.replica, start_us, {"tokens": step.num_tokens})


def _step_args(step: StepRecord) -> dict[str, Any]:
    return {
        "batch_size": step.batch_size,
        "num_batched_tokens": step.num_tokens,
        "num_batched_prompt_tokens": step.num_prefill_tokens,
        "num_batched_output_tokens": step.num_decode_tokens,
        "num_preempted": step.num_preempted,
        "model_ms": 1e3 * step.model_s,
    }


def _operations(rows: RunRows) -> Iterator[Event]:
    """Operations whose start is unknown are placed one after the other from the start of their step."""
    cursor = {(step.replica, step.step_id): step.computing_from_s for step in rows.steps}
    for row in rows.operations:
        key = (row.replica, row.step_id)
        start_s = row.start_s if row.start_s is not None else cursor.get(key)
        if start_s is None:
            continue
        cursor[key] = start_s + row.duration_s
        yield _complete(row.name, row.replica, OPERATIONS, *_span(rows, start_s, start_s + row.duration_s))


def _mapping(rows: RunRows) -> Iterator[Event]:
    """Mapping between two samples of the memory: its duration is known, its start is not."""
    last: dict[int, float] = {}
    for sample, row in zip(rows.memory, memory_table(rows).rows, strict=True):
        at_us = _span(rows, sample.at_s, sample.at_s)[0]
        stats = sample.stats
        levels = {"in use": stats.mapped_bytes - stats.idle_bytes, "idle": stats.idle_bytes}
        yield _counter("mapped bytes", sample.replica, at_us, levels)
        if row["kv_mapping_time"] > 0:
            span = _span(rows, last[sample.replica], sample.at_s)
            event = _complete("map pages, at some time in this", sample.replica, MAPPER, *span)
            yield event | {"args": {"mapping_ms": 1e3 * row["kv_mapping_time"]}}
        last[sample.replica] = sample.at_s


def _requests(rows: RunRows) -> Iterator[Event]:
    end_of_run_s = rows.origin_s + rows.duration_s
    for index, record in enumerate(rows.requests):
        for name, start_s, end_s in _phases(record, end_of_run_s):
            event = _complete(name, REQUESTS_PID, index, *_span(rows, start_s, end_s))
            yield event | {"args": _request_args(record)}


def _phases(record: RequestRecord, end_of_run_s: float) -> Iterator[tuple[str, float, float]]:
    """Waiting, prefill and decode, as far as the request got."""
    names = ("waiting", "prefill", "decode")
    times = [record.arrived_at_s, record.scheduled_at_s, record.first_token_at_s]
    end_s = record.finished_at_s if record.finished_at_s is not None else end_of_run_s
    known = [at_s for at_s in times if at_s is not None] + [end_s]
    for name, (start_s, stop_s) in zip(names, pairwise(known), strict=False):
        yield name, start_s, stop_s


def _request_args(record: RequestRecord) -> dict[str, Any]:
    return {
        "prompt_tokens": record.num_prompt_tokens,
        "output_tokens": record.request_num_decode_tokens,
        "restarts": record.num_restarts,
        "finish_reason": record.finish_reason,
    }


def _span(rows: RunRows, start_s: float, end_s: float) -> tuple[float, float]:
    return 1e6 * (start_s - rows.origin_s), 1e6 * max(end_s - start_s, 0.0)


def _complete(name: str, process: int, thread: int, start_us: float, duration_us: float) -> Event:
    return {"name": name, "ph": "X", "pid": process, "tid": thread, "ts": start_us, "dur": duration_us}


def _counter(name: str, process: int, at_us: float, values: Mapping[str, float]) -> Event:
    return {"name": name, "ph": "C", "pid": process, "tid": 0, "ts": at_us, "args": values}


def _metadata(kind: str, process: int, thread: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
