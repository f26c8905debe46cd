"""Rows of a run, and every metric of a request by its published name. Knows no clock, no engine and no file format.

Times are seconds of one clock, whichever it was. One request's life, and the spans that the metrics are made of:

    arrived        scheduled                first token                          finished
    |--------------|========|···|===========|=====|··|=====|········|=====|=====|
     scheduling     = in a step  · beside steps                preempted
     delay          (execution)    (preemption, with the time spent preempted)

The names, and what each divides by, are those of Sarathi-Serve's metrics store, so that notebooks written for its CSV
files read these. Metrics of what has not happened are None.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from sarathi.messages import CacheCapacity, Chunk, MemoryStats


@dataclass(slots=True)
class RequestRecord:
    """One request: what was seen of it, and the metrics that follow.

    token_times_s: when each output token was there, in order.
    execution_s: sum of the durations of the steps that it was part of.
    num_steps: those steps. num_restarts: how often its memory was taken and its tokens computed again.
    capacity: how its tokens are stored; None where that is not known.
    """

    request_id: str
    num_prompt_tokens: int
    arrived_at_s: float
    inter_arrival_s: float | None = None
    scheduled_at_s: float | None = None
    closed_at_s: float | None = None
    finish_reason: str | None = None
    execution_s: float = 0.0
    num_steps: int = 0
    num_restarts: int = 0
    token_times_s: "array[float]" = field(default_factory=lambda: array("d"))
    capacity: CacheCapacity | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it ran to its own end: neither refused, nor aborted, nor cut off with the run."""
        return self.finish_reason in ("stop", "length") and bool(self.token_times_s)

    @property
    def finished_at_s(self) -> float | None:
        """Its end, or the time of its last token where that was noted later in the same step."""
        if self.closed_at_s is None or not self.token_times_s:
            return self.closed_at_s
        return max(self.closed_at_s, self.token_times_s[-1])

    @property
    def first_token_at_s(self) -> float | None:
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def token_gaps_s(self) -> list[float]:
        """Time between each two tokens that follow each other; n - 1 values of n tokens."""
        times = self.token_times_s
        return [after - before for before, after in pairwise(times)]

    @property
    def request_num_decode_tokens(self) -> int:
        return len(self.token_times_s)

    @property
    def request_num_prefill_tokens(self) -> int:
        return self.num_prompt_tokens

    @property
    def request_num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.token_times_s)

    @property
    def request_pd_ratio(self) -> float | None:
        return _ratio(self.num_prompt_tokens, len(self.token_times_s))

    @property
    def request_inter_arrival_delay(self) -> float | None:
        return self.inter_arrival_s

    @property
    def request_num_restarts(self) -> int:
        return self.num_restarts

    @property
    def request_num_pauses(self) -> int:
        """Steps that it was part of: after each of them a request waits for the next."""
        return self.num_steps

    @property
    def request_num_ignored(self) -> int:
        """1 where it ended without being served."""
        return int(self.closed_at_s is not None and not self.is_complete)

    @property
    def kv_blocks_mapped(self) -> int | None:
        """Rows of memory that its tokens took in the end: pages of each region, or blocks where paged."""
        return self.capacity.rows_for(self.request_num_tokens) if self.capacity else None

    @property
    def kv_fragmentation_percent(self) -> float | None:
        """The part of those rows that no token filled."""
        if not self.capacity or not self.kv_blocks_mapped:
            return None
        used = self.request_num_tokens * self.capacity.token_bytes
        return 100.0 * (1.0 - used / (self.kv_blocks_mapped * self.capacity.page_bytes))

    @property
    def request_e2e_time(self) -> float | None:
        return _difference(self.finished_at_s, self.arrived_at_s)

    @property
    def request_e2e_time_normalized(self) -> float | None:
        return self._a_token(self.request_e2e_time)

    @property
    def request_e2e_time_piecewise_normalized(self) -> float | None:
        return _sum(self.request_scheduling_delay, self.request_execution_plus_preemption_time_normalized)

    @property
    def request_execution_time(self) -> float | None:
        return self.execution_s if self.closed_at_s is not None else None

    @property
    def request_execution_time_normalized(self) -> float | None:
        return self._a_token(self.request_execution_time)

    @property
    def request_preemption_time(self) -> float | None:
        """Time from its first step to its end in which it was part of no step."""
        served = self.request_execution_plus_preemption_time
        return None if served is None else max(served - self.execution_s, 0.0)

    @property
    def request_scheduling_delay(self) -> float | None:
        return _difference(self.scheduled_at_s, self.arrived_at_s)

    @property
    def request_execution_plus_preemption_time(self) -> float | None:
        return _difference(self.finished_at_s, self.scheduled_at_s)

    @property
    def request_execution_plus_preemption_time_normalized(self) -> float | None:
        return self._a_token(self.request_execution_plus_preemption_time)

    @property
    def prefill_e2e_time(self) -> float | None:
        """Time to first token."""
        return _difference(self.first_token_at_s, self.arrived_at_s)

    @property
    def prefill_e2e_time_normalized(self) -> float | None:
        return _ratio(self.prefill_e2e_time, self.num_prompt_tokens)

    @property
    def prefill_e2e_time_piecewise_normalized(self) -> float | None:
        return _sum(self.request_scheduling_delay, self.prefill_time_execution_plus_preemption_normalized)

    @property
    def prefill_time_execution_plus_preemption(self) -> float | None:
        return _difference(self.first_token_at_s, self.scheduled_at_s)

    @property
    def prefill_time_execution_plus_preemption_normalized(self) -> float | None:
        return _ratio(self.prefill_time_execution_plus_preemption, self.num_prompt_tokens)

    @property
    def decode_time_execution_plus_preemption_normalized(self) -> float | None:
        return self._a_token(_difference(self.finished_at_s, self.first_token_at_s))

    def _a_token(self, seconds: float | None) -> float | None:
        return _ratio(seconds, len(self.token_times_s))


class StepTimes(NamedTuple):
    """When a step began, was decided on, was computed, and had its outcome handed out."""

    started_at_s: float
    scheduled_at_s: float
    executed_at_s: float
    ended_at_s: float


class StepRecord(NamedTuple):
    """One step. num_decode_tokens: tokens of requests past their prompt, one each; prefill is the rest, with what is
    computed again after a preemption. model_s: on the device. replica: which engine it ran on."""

    step_id: int
    replica: int
    times: StepTimes
    batch_size: int
    num_tokens: int
    num_decode_tokens: int
    num_preempted: int
    model_s: float

    @property
    def num_prefill_tokens(self) -> int:
        return self.num_tokens - self.num_decode_tokens

    @property
    def duration_s(self) -> float:
        return self.times.ended_at_s - self.times.started_at_s


class OperationRecord(NamedTuple):
    """One operation in one step: on the device where `on_device`, else on the processor. start_s is None where only
    the duration could be measured."""

    name: str
    step_id: int
    replica: int
    start_s: float | None
    duration_s: float
    on_device: bool


class MemoryRecord(NamedTuple):
    """The cache's memory at one time; its counters go on from the start of the engine."""

    at_s: float
    step_id: int
    replica: int
    stats: MemoryStats


class ScheduleRecord(NamedTuple):
    """What one step was made of, in the order of the batch."""

    step_id: int
    replica: int
    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...]


@dataclass(frozen=True)
class RunRows:
    """All rows of one run. origin_s: time zero of its series. ended_at_s: when recording ended.

    page_bytes: size of a page of physical memory; None where the cache has none.
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
        """From time zero to the last token or step, else to the end of recording."""
        last = [step.times.ended_at_s for step in self.steps[-1:]]
        last += [request.finished_at_s for request in self.requests if request.finished_at_s is not None]
        return max(last, default=self.ended_at_s) - self.origin_s


def merge(parts: Iterable[RunRows]) -> RunRows:
    """One result of several replicas whose clocks agree (one machine's monotonic clock does); rows in order of time."""
    rows = list(parts)
    if not rows:
        raise ValueError("nothing to merge: there must be the rows of at least one replica")
    return RunRows(
        origin_s=min(part.origin_s for part in rows),
        ended_at_s=max(part.ended_at_s for part in rows),
        requests=_gather(rows, "requests", key=lambda row: row.arrived_at_s),
        steps=_gather(rows, "steps", key=lambda row: row.times.started_at_s),
        operations=_gather(rows, "operations", key=lambda row: (row.replica, row.step_id)),
        memory=_gather(rows, "memory", key=lambda row: row.at_s),
        schedule=_gather(rows, "schedule", key=lambda row: (row.replica, row.step_id)),
        page_bytes=rows[0].page_bytes,
    )


def _gather(parts: list[RunRows], name: str, key: Any) -> tuple[Any, ...]:
    return tuple(sorted((row for part in parts for row in getattr(part, name)), key=key))


def _difference(end: float | None, start: float | None) -> float | None:
    return None if end is None or start is None else end - start


def _ratio(value: float | None, count: int) -> float | None:
    return None if value is None or not count else value / count


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
