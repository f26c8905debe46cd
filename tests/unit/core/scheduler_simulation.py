"""A worker made of lists and a clock made of a sum, to drive schedulers with. It checks what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from zlib import crc32

from sarathi.config.backend import BackendSpec
from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager import make_block_space_manager
from sarathi.core.scheduler import Scheduler, make_scheduler
from sarathi.messages import CacheCapacity, Chunk, SampledToken, SchedulerOutput, StepResult
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

VOCAB = 23
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: any change of any token before changes what follows."""
    return hash(tuple(tokens)) % VOCAB


@dataclass
class KnownRequest:
    """What a worker knows of a request."""

    tokens: list[int]
    computed: int = 0
    granted: int = 0
    blocks: list[int] = field(default_factory=list)


class FakeWorker:
    """Executes steps at once. `rows` may be lowered at any time: then steps fail until the scheduler has caught up."""

    def __init__(self, capacity: CacheCapacity, paged: bool, num_slots: int) -> None:
        self.capacity, self.paged, self.num_slots = capacity, paged, num_slots
        self.rows = capacity.rows
        self.sequences: dict[str, KnownRequest] = {}
        self.in_flight: dict[int, SchedulerOutput] = {}
        self.num_failures = 0

    def execute(self, out: SchedulerOutput, step_s: float = 0.0) -> StepResult:
        self._release(out)
        self._learn(out)
        self.in_flight[out.step_id] = out
        if out.num_recoveries < self.num_failures:
            return StepResult(out.step_id, available_rows=self.rows)
        if self.held_rows() > self.rows:
            self.num_failures += 1
            return StepResult(out.step_id, available_rows=self.rows)
        tokens = [self._compute(chunk) for chunk in out.chunks]
        return StepResult(out.step_id, tuple(token for token in tokens if token is not None), step_s)

    def complete(self, step_id: int) -> None:
        """The scheduler has the result: nothing of that step is in flight any more."""
        del self.in_flight[step_id]

    def held_rows(self) -> int:
        return sum(self.capacity.rows_for(sequence.granted) for sequence in self.sequences.values())

    def _release(self, out: SchedulerOutput) -> None:
        busy = {chunk.request_id for step in self.in_flight.values() for chunk in step.chunks}
        assert not busy & {*out.preempted, *out.finished}, "memory of a step in flight was released"
        for request_id in out.finished:
            self.sequences.pop(request_id, None)  # not known if the step that brought it was lost
        for request_id in out.preempted:
            sequence = self.sequences[request_id]
            sequence.computed, sequence.granted, sequence.blocks = 0, 0, []

    def _learn(self, out: SchedulerOutput) -> None:
        for new in out.new_requests:
            assert new.request_id not in self.sequences
            self.sequences[new.request_id] = KnownRequest(list(new.token_ids))
        for chunk in out.chunks:
            sequence = self.sequences[chunk.request_id]
            assert chunk.granted_tokens >= max(sequence.granted, chunk.start + chunk.num_tokens)
            sequence.granted = chunk.granted_tokens
            sequence.blocks += chunk.block_ids
            assert len(sequence.blocks) == (self.capacity.rows_for(sequence.granted) if self.paged else 0)
        blocks = [block for sequence in self.sequences.values() for block in sequence.blocks]
        assert len(blocks) == len(set(blocks)), "a block is shared"
        assert sum(sequence.granted > 0 for sequence in self.sequences.values()) <= self.num_slots

    def _compute(self, chunk: Chunk) -> SampledToken | None:
        sequence = self.sequences[chunk.request_id]
        assert chunk.start == sequence.computed and chunk.num_tokens >= 1
        sequence.computed += chunk.num_tokens
        assert sequence.computed <= len(sequence.tokens)
        assert chunk.samples == (sequence.computed == len(sequence.tokens))
        if not chunk.samples:
            return None
        sequence.tokens.append(next_token(sequence.tokens))
        return SampledToken(chunk.request_id, sequence.tokens[-1])


def make_pair(
    config: SchedulerConfig, backend: str, capacity: CacheCapacity, max_len: int, num_micro_batches: int = 1
) -> tuple[Scheduler, FakeWorker]:
    """A scheduler, and the worker that it drives."""
    spec = BackendSpec.parse(backend)
    scheduler = make_scheduler(config, make_block_space_manager(spec, capacity), max_len, num_micro_batches)
    return scheduler, FakeWorker(capacity, spec.is_paged, config.max_num_seqs)


def make_request(name: str, num_prompt: int, max_tokens: int | None = 16, **params: object) -> Request:
    """A request whose prompt differs from every other's; it stops at EOS unless told to ignore it."""
    prompt = [crc32(f"{name}.{i}".encode()) % VOCAB for i in range(num_prompt)]
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **params), frozenset([EOS]))


def expected_output(request: Request, max_len: int) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that is alone in the world."""
    params = request.sampling_params
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
    output: list[int] = []
    while True:
        output.append(next_token((*request.prompt_token_ids, *output)))
        if output[-1] in stops and len(output) > params.min_tokens:
            return output, "stop"
        if len(output) == params.max_tokens or request.num_prompt_tokens + len(output) == max_len:
            return output, "length"


def step(scheduler: Scheduler, worker: FakeWorker, step_s: float = 0.0) -> SchedulerOutput:
    """One step from schedule to update."""
    out = scheduler.schedule()
    result = worker.execute(out, step_s)
    worker.complete(out.step_id)
    scheduler.update(out, result)
    scheduler.check_integrity()
    return out


def run_to_end(scheduler: Scheduler, worker: FakeWorker, max_steps: int = 5000) -> list[SchedulerOutput]:
    """Steps until there is no work; fails if there is no end to it."""
    outputs = []
    while scheduler.has_work:
        outputs.append(step(scheduler, worker))
        assert len(outputs) <= max_steps, "no end in sight"
    return outputs


@dataclass
class Timeline:
    """When things happened on a simulated clock, in seconds."""

    token_times_s: dict[str, list[float]]
    peak_rows: int
    peak_running: int

    def gaps_s(self, name: str) -> list[float]:
        times = self.token_times_s[name]
        return [after - before for before, after in pairwise(times)]


def simulate(
    scheduler: Scheduler, worker: FakeWorker, arrivals: Sequence[tuple[float, Request]],
    cost_s: Callable[[int], float] = lambda num_tokens: 1e-3 + 1e-5 * num_tokens,
) -> Timeline:  # fmt: skip
    """Play requests that arrive at given times; a step of n tokens takes cost_s(n)."""
    clock_s, waiting = 0.0, sorted(arrivals, key=lambda arrival: arrival[0])
    line = Timeline({request.request_id: [] for _, request in arrivals}, 0, 0)
    while waiting or scheduler.has_work:
        if not scheduler.has_work:
            clock_s = max(clock_s, waiting[0][0])
        while waiting and waiting[0][0] <= clock_s:
            scheduler.add(waiting.pop(0)[1])
        out = scheduler.schedule()
        clock_s += cost_s(out.num_tokens)
        result = worker.execute(out, cost_s(out.num_tokens))
        worker.complete(out.step_id)
        for sampled in result.tokens:
            line.token_times_s[sampled.request_id].append(clock_s)
        line.peak_rows = max(line.peak_rows, scheduler.block_space_manager.num_used_rows)
        line.peak_running = max(line.peak_running, scheduler.num_running)
        scheduler.update(out, result)
    return line
