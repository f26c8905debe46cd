"""Trace of a run for Perfetto and chrome://tracing: steps, operations, page mapping and requests.

Format: complete ("X"), counter ("C") and metadata ("M") events of the Trace Event Format; times in microseconds since
time zero. Each replica is a process with threads for steps, device operations and page mapping; one more process has a
thread for each request.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from sarathi.metrics.records import RunRecords, StepRecord
from sarathi.metrics.request_record import RequestRecord
from sarathi.metrics.tables import COMPUTING, cpu_spans, memory_table

STEPS, PARTS, OPERATIONS, MAPPER = range(4)
THREADS = {STEPS: "steps", PARTS: "between steps", OPERATIONS: "operations", MAPPER: "mapping"}
REQUESTS_PID = 1_000_000

Event = dict[str, Any]


def trace_events(records: RunRecords) -> Iterator[Event]:
    """All events of the trace."""
    for part in (_names, _steps, _operations, _mapping, _requests):
        yield from part(records)


def num_trace_events(records: RunRecords) -> int:
    """Estimated number of events in the trace; each takes about 150 bytes."""
    return 5 * len(records.steps) + len(records.operations) + 2 * len(records.memory) + 4 * len(records.requests)


def _names(records: RunRecords) -> Iterator[Event]:
    for replica in sorted({step.replica for step in records.steps}):
        yield _metadata("process_name", replica, 0, f"replica {replica}")
        for thread, name in THREADS.items():
            yield _metadata("thread_name", replica, thread, name)
    yield _metadata("process_name", REQUESTS_PID, 0, "requests")
    for index, record in enumerate(records.requests):
        yield _metadata("thread_name", REQUESTS_PID, index, f"request {record.request_id}")


def _steps(records: RunRecords) -> Iterator[Event]:
    for step in records.steps:
        start_us, duration_us = _span(records, step.busy_from_s, step.times.ended_at_s)
        yield _complete(f"step {step.step_id}", step.replica, STEPS, start_us, duration_us) | {"args": _step_args(step)}
        for name, (before, after) in cpu_spans(step).items():
            thread = STEPS if name == COMPUTING else PARTS
            yield _complete(name, step.replica, thread, *_span(records, before, after))
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


def _operations(records: RunRecords) -> Iterator[Event]:
    """Device operations. Those without a start time are laid end to end from the start of their step."""
    cursor = {(step.replica, step.step_id): step.computing_from_s for step in records.steps}
    for operation in records.operations:
        key = (operation.replica, operation.step_id)
        start_s = operation.start_s if operation.start_s is not None else cursor.get(key)
        if start_s is None:
            continue
        cursor[key] = start_s + operation.duration_s
        yield _complete(
            operation.name, operation.replica, OPERATIONS, *_span(records, start_s, start_s + operation.duration_s)
        )


def _mapping(records: RunRecords) -> Iterator[Event]:
    """Page mapping between two memory samples: its duration is known, its start is not."""
    last: dict[int, float] = {}
    for sample, cells in zip(records.memory, memory_table(records).records, strict=True):
        at_us = _span(records, sample.at_s, sample.at_s)[0]
        stats = sample.stats
        levels = {"in use": stats.mapped_bytes - stats.idle_bytes, "idle": stats.idle_bytes}
        yield _counter("mapped bytes", sample.replica, at_us, levels)
        if cells["kv_mapping_time"] > 0:
            span = _span(records, last[sample.replica], sample.at_s)
            event = _complete("map pages, at some time in this", sample.replica, MAPPER, *span)
            yield event | {"args": {"mapping_ms": 1e3 * cells["kv_mapping_time"]}}
        last[sample.replica] = sample.at_s


def _requests(records: RunRecords) -> Iterator[Event]:
    end_of_run_s = records.origin_s + records.duration_s
    for index, record in enumerate(records.requests):
        for name, start_s, end_s in _phases(record, end_of_run_s):
            event = _complete(name, REQUESTS_PID, index, *_span(records, start_s, end_s))
            yield event | {"args": _request_args(record)}


def _phases(record: RequestRecord, end_of_run_s: float) -> Iterator[tuple[str, float, float]]:
    """Waiting, prefill and decode, up to the phase that the request reached."""
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


def _span(records: RunRecords, start_s: float, end_s: float) -> tuple[float, float]:
    return 1e6 * (start_s - records.origin_s), 1e6 * max(end_s - start_s, 0.0)


def _complete(name: str, process: int, thread: int, start_us: float, duration_us: float) -> Event:
    return {"name": name, "ph": "X", "pid": process, "tid": thread, "ts": start_us, "dur": duration_us}


def _counter(name: str, process: int, at_us: float, values: Mapping[str, float]) -> Event:
    return {"name": name, "ph": "C", "pid": process, "tid": 0, "ts": at_us, "args": values}


def _metadata(kind: str, process: int, thread: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
