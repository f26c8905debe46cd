"""Records of a run (steps, operations, memory, schedule), and the merge of several replicas' records.

All times are seconds of one monotonic clock.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from sarathi.messages import Chunk, HostTimes, MemoryStats
from sarathi.metrics.request_record import RequestRecord


class StepTimes(NamedTuple):
    """Timestamps of a step: start, end of scheduling, end of execution, outputs returned."""

    started_at_s: float
    scheduled_at_s: float
    executed_at_s: float
    ended_at_s: float


class StepRecord(NamedTuple):
    """One step.

    replica: index of the engine. model_s: device time. host: CPU times.
    busy_from_s: start of the step, or end of the previous step if that is later: spans of steps do not overlap.
    num_decode_tokens: one for each decode. All other tokens are prefill, also those recomputed after a preemption.
    """

    step_id: int
    replica: int
    times: StepTimes
    busy_from_s: float
    batch_size: int
    num_tokens: int
    num_decode_tokens: int
    num_preempted: int
    model_s: float
    host: HostTimes | None = None

    @property
    def num_prefill_tokens(self) -> int:
        return self.num_tokens - self.num_decode_tokens

    @property
    def duration_s(self) -> float:
        """Time that the step added to the run. With overlapping steps: since the end of the previous step."""
        return self.times.ended_at_s - self.busy_from_s

    @property
    def computing_from_s(self) -> float:
        return max(self.times.scheduled_at_s, self.busy_from_s)


class OperationRecord(NamedTuple):
    """One operation of one step, on the device or the CPU. start_s: None if only the duration was measured."""

    name: str
    step_id: int
    replica: int
    start_s: float | None
    duration_s: float
    on_device: bool


class MemoryRecord(NamedTuple):
    """A sample of the KV cache's memory. Counters are cumulative since the engine's start."""

    at_s: float
    step_id: int
    replica: int
    stats: MemoryStats


class ScheduleRecord(NamedTuple):
    """The chunks of one step, in the order of the batch."""

    step_id: int
    replica: int
    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...]


@dataclass(frozen=True)
class RunRecords:
    """All records of one run. origin_s: time zero of its time series. ended_at_s: when recording ended.

    page_bytes: size of a physical page; None if the cache has no pages.
    """

    origin_s: float
    ended_at_s: float
    requests: tuple[RequestRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    operations: tuple[OperationRecord, ...] = ()
    memory: tuple[MemoryRecord, ...] = ()
    schedule: tuple[ScheduleRecord, ...] = ()
    page_bytes: int | None = None

    @property
    def duration_s(self) -> float:
        """From time zero to the last token or step; without either, to the end of recording."""
        last = [step.times.ended_at_s for step in self.steps]
        last += [request.finished_at_s for request in self.requests if request.finished_at_s is not None]
        return max(last, default=self.ended_at_s) - self.origin_s


def merge(parts: Iterable[RunRecords]) -> RunRecords:
    """The records of several replicas in order of time. Their clocks must be synchronized.

    inter_arrival_s is recomputed over the requests of all replicas. ValueError if `parts` is empty.
    """
    records = list(parts)
    if not records:
        raise ValueError("nothing to merge: records of at least one replica are needed")
    return RunRecords(
        origin_s=min(part.origin_s for part in records),
        ended_at_s=max(part.ended_at_s for part in records),
        requests=_with_gaps(_gather(records, "requests", key=lambda record: record.arrived_at_s)),
        steps=_gather(records, "steps", key=lambda record: record.times.started_at_s),
        operations=_gather(records, "operations", key=lambda record: (record.replica, record.step_id)),
        memory=_gather(records, "memory", key=lambda record: record.at_s),
        schedule=_gather(records, "schedule", key=lambda record: (record.replica, record.step_id)),
        page_bytes=records[0].page_bytes,
    )


def _with_gaps(requests: Sequence[RequestRecord]) -> tuple[RequestRecord, ...]:
    gaps_s = [None, *(after.arrived_at_s - before.arrived_at_s for before, after in pairwise(requests))]
    return tuple(replace(record, inter_arrival_s=gap_s) for record, gap_s in zip(requests, gaps_s, strict=False))


def _gather(parts: list[RunRecords], name: str, key: Any) -> tuple[Any, ...]:
    return tuple(sorted((record for part in parts for record in getattr(part, name)), key=key))
