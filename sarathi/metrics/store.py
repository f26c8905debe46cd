"""Recorder of a running engine's metrics."""

import time
from collections.abc import Callable
from typing import Protocol

from sarathi.messages import CacheCapacity, Chunk, MemoryStats, SchedulerOutput, StepResult
from sarathi.metrics.records import MemoryRecord, OperationRecord, RunRecords, ScheduleRecord, StepRecord, StepTimes
from sarathi.metrics.request_record import RequestRecord

Clock = Callable[[], float]


class MetricsSink(Protocol):
    """Callbacks through which an engine reports its metrics, in order of time."""

    def on_request_arrived(self, request_id: str, num_prompt_tokens: int, arrived_at_s: float) -> None: ...

    def on_request_finished(self, request_id: str, finish_reason: str) -> None: ...

    def on_step(self, out: SchedulerOutput, result: StepResult, times: StepTimes) -> None: ...

    def on_operation(self, name: str, start_s: float | None, duration_s: float, on_device: bool = False) -> None: ...

    def on_memory(self, stats: MemoryStats) -> None: ...


class MetricsStore:
    """Records the metrics of one engine.

    clock: the engine's clock, in seconds.
    replica: index of the engine; prefix of its request ids.
    capacity: of the KV cache, to count the rows that requests used; None: rows are not counted.
    page_bytes: size of a physical page; None if the cache has no pages.
    keep_schedule: also keep the chunks of each step, about 100 bytes each.
    """

    def __init__(
        self, clock: Clock = time.monotonic, *, replica: int = 0, capacity: CacheCapacity | None = None,
        page_bytes: int | None = None, keep_schedule: bool = False,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._replica = replica
        self._capacity = capacity
        self._page_bytes = page_bytes
        self._keep_schedule = keep_schedule
        self._step_id = 0
        self.reset()

    def reset(self) -> None:
        """Discard all records, e.g. after a warm-up, and set time zero to now. Step ids continue."""
        self._origin_s = self._clock()
        self._last_arrival_s: float | None = None
        self._last_end_s = self._origin_s
        self._requests: list[RequestRecord] = []
        self._by_id: dict[str, RequestRecord] = {}
        self._steps: list[StepRecord] = []
        self._operations: list[OperationRecord] = []
        self._memory: list[MemoryRecord] = []
        self._schedule: list[ScheduleRecord] = []

    def records(self) -> RunRecords:
        """All records so far, including those of requests that have not ended."""
        return RunRecords(
            self._origin_s, self._clock(), tuple(self._requests), tuple(self._steps), tuple(self._operations),
            tuple(self._memory), tuple(self._schedule), self._page_bytes,
        )  # fmt: skip

    def on_request_arrived(self, request_id: str, num_prompt_tokens: int, arrived_at_s: float) -> None:
        """arrived_at_s: may lie before this call."""
        gap_s = None if self._last_arrival_s is None else arrived_at_s - self._last_arrival_s
        self._last_arrival_s = arrived_at_s
        name = f"{self._replica}_{request_id}"
        record = RequestRecord(name, num_prompt_tokens, arrived_at_s, gap_s, capacity=self._capacity)
        self._requests.append(record)
        self._by_id[request_id] = record

    def on_request_finished(self, request_id: str, finish_reason: str) -> None:
        """Its last token may be reported by the next on_step."""
        record = self._by_id.get(request_id)
        if record is not None:
            record.closed_at_s = self._clock()
            record.finish_reason = finish_reason

    def on_step(self, out: SchedulerOutput, result: StepResult, times: StepTimes) -> None:
        """Record a step and its tokens. Ignores empty steps, and requests that arrived before a reset."""
        self._step_id = out.step_id
        self._note_preempted(out.preempted)
        if not out.chunks or result.available_rows is not None:
            return
        busy_from_s = max(times.started_at_s, self._last_end_s)
        self._last_end_s = times.ended_at_s
        num_decodes = self._note_chunks(out.chunks, busy_from_s, times.ended_at_s - busy_from_s)
        self._note_tokens(result, times)
        step = StepRecord(
            out.step_id, self._replica, times, busy_from_s, len(out.chunks), out.num_tokens, num_decodes,
            len(out.preempted), result.model_s, result.host,
        )  # fmt: skip
        self._steps.append(step)
        if self._keep_schedule:
            self._schedule.append(ScheduleRecord(out.step_id, self._replica, out.chunks, out.preempted))

    def on_operation(self, name: str, start_s: float | None, duration_s: float, on_device: bool = False) -> None:
        """Call it before the on_step of the step that the operation belongs to, or after the run."""
        self._operations.append(OperationRecord(name, self._step_id + 1, self._replica, start_s, duration_s, on_device))

    def on_memory(self, stats: MemoryStats) -> None:
        self._memory.append(MemoryRecord(self._clock(), self._step_id, self._replica, stats))

    def _note_chunks(self, chunks: tuple[Chunk, ...], busy_from_s: float, duration_s: float) -> int:
        """Record the step's requests; returns the number of decodes."""
        find, num_decodes = self._by_id.get, 0
        for request_id, start, num_tokens, *_ in chunks:
            record = find(request_id)
            if record is None:
                continue
            if record.scheduled_at_s is None:
                record.scheduled_at_s = busy_from_s
            record.execution_s += duration_s
            record.num_steps += 1
            num_decodes += num_tokens == 1 and start >= record.num_prompt_tokens
        return num_decodes

    def _note_preempted(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            if request_id in self._by_id:
                self._by_id[request_id].num_restarts += 1

    def _note_tokens(self, result: StepResult, times: StepTimes) -> None:
        """Record token times. Drops tokens of requests that ended during the step, as the engine does."""
        find = self._by_id.get
        for token in result.tokens:
            record = find(token[0])
            if token[1] < 0:  # no token was sampled
                continue
            if record is not None and (record.closed_at_s is None or record.closed_at_s >= times.executed_at_s):
                record.token_times_s.append(times.ended_at_s)
