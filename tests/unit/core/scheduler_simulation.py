"""A worker made of lists and a clock made of a sum, to drive schedulers with. It checks what it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from zlib import crc32

from sarathi.config.backend import BackendSpec
from sarathi.config.schema import SchedulerConfig
from sarathi.core.factory import make_block_space_manager
from sarathi.core.scheduler import Scheduler, make_scheduler
from sarathi.messages import (
    EVERY_KEY,
    CacheCapacity,
    Chunk,
    SampledToken,
    SchedulerOutput,
    SharedPrefix,
    StepResult,
)
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

VOCAB = 23
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: any change of any token before changes what follows."""
    return hash(tuple(tokens)) % VOCAB


class Row:
    """A row of the cache; several sequences may hold it."""


@dataclass
class KnownRequest:
    """What a worker knows of a request, or of a sequence that is kept.

    written: the tokens whose keys and values are in its rows.
    """

    tokens: list[int]
    granted: int = 0
    blocks: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class FakeWorker:
    """Executes steps at once. `rows` may be lowered at any time: then steps fail until the scheduler has caught up."""

    def __init__(self, capacity: CacheCapacity, paged: bool, num_slots: int) -> None:
        self.capacity, self.paged, self.num_slots = capacity, paged, num_slots
        self.rows = capacity.rows
        self.sequences: dict[str, KnownRequest] = {}
        self.kept: dict[int, KnownRequest] = {}
        self.in_flight: dict[int, SchedulerOutput] = {}
        self.copied: dict[int, list[tuple[list[Row], int]]] = {}  # a step in flight copies the first of these rows
        self.num_failures = self.num_grouped = 0

    def execute(self, out: SchedulerOutput, step_s: float = 0.0) -> StepResult:
        self._release(out)
        self._change_kept(out)
        self._learn(out)
        self.in_flight[out.step_id] = out
        if out.num_recoveries < self.num_failures:
            return StepResult(out.step_id, available_rows=self.rows)
        if self.held_rows() > self.rows:
            self.num_failures += 1
            return StepResult(out.step_id, available_rows=self.rows)
        self._copy(out)
        self._check_groups(out)
        shared = self._shared_rows()
        tokens = [self._compute(chunk, shared) for chunk in out.chunks]
        return StepResult(out.step_id, tuple(token for token in tokens if token is not None), step_s)

    def complete(self, step_id: int) -> None:
        """The scheduler has the result: nothing of that step is in flight any more."""
        del self.in_flight[step_id]
        self.copied.pop(step_id, None)

    def held_rows(self) -> int:
        return len(set(chain.from_iterable(each.rows for each in self._known())))

    def _shared_rows(self) -> set[Row]:
        holders = Counter(chain.from_iterable(each.rows for each in self._known()))
        return {row for row, count in holders.items() if count > 1}

    def _known(self) -> list[KnownRequest]:
        return [*self.sequences.values(), *self.kept.values()]

    def _release(self, out: SchedulerOutput) -> None:
        busy = {chunk.request_id for step in self.in_flight.values() for chunk in step.chunks}
        if not self.num_failures:
            assert not busy & {*out.preempted, *out.finished}, "memory of a step in flight was released"
        for request_id, key in out.prefixes.retained:
            sequence = self.sequences[request_id]
            self.kept[key] = KnownRequest([], 0, sequence.blocks, sequence.written, sequence.rows)
            self._forget(sequence)
        for request_id in out.preempted:
            self._free(self.sequences[request_id])
        for request_id in out.finished:
            if request_id in self.sequences:  # not known if the step that brought it was lost
                self._free(self.sequences.pop(request_id))

    def _change_kept(self, out: SchedulerOutput) -> None:
        for key, rows in out.prefixes.evicted:
            for each in list(self.kept) if key == EVERY_KEY else [key]:
                sequence = self.kept[each]
                self._check_not_copied(sequence.rows, rows)
                del sequence.rows[rows:], sequence.blocks[rows:]
                del sequence.written[self.capacity.tokens_within(rows) :]
                if not rows:
                    del self.kept[each]
        for request_id, key in out.prefixes.continued:
            sequence = self.kept.pop(key)
            self._learn_new(out)
            known = self.sequences[request_id]
            chunk = next(chunk for chunk in out.chunks if chunk.request_id == request_id)
            known.written = sequence.written[: chunk.start]  # the tokens of a last step may be unknown to the scheduler
            known.rows = sequence.rows
            assert not self.paged or chunk.block_ids[: len(known.rows)] == tuple(sequence.blocks)

    def _learn_new(self, out: SchedulerOutput) -> None:
        for new in out.new_requests:
            self.sequences.setdefault(new.request_id, KnownRequest(list(new.token_ids)))

    def _learn(self, out: SchedulerOutput) -> None:
        self._learn_new(out)
        for prefix in out.prefixes.shared:
            source, target = self._source(prefix), self.sequences[prefix.request_id]
            rows = self.capacity.rows_holding(prefix.num_mapped)
            assert self.capacity.tokens_within(rows) == prefix.num_mapped and not target.rows
            target.rows = source.rows[:rows]
        for chunk in out.chunks:
            sequence = self.sequences[chunk.request_id]
            assert chunk.granted_tokens >= max(sequence.granted, chunk.start + chunk.num_tokens)
            sequence.granted = chunk.granted_tokens
            sequence.blocks += chunk.block_ids
            needed = self.capacity.rows_for(sequence.granted)
            sequence.rows += [Row() for _ in range(needed - len(sequence.rows))]
            assert len(sequence.blocks) == (needed if self.paged else 0)
        for prefix in out.prefixes.shared if self.paged else ():
            rows = self.capacity.rows_holding(prefix.num_mapped)
            source, target = self._source(prefix), self.sequences[prefix.request_id]
            assert target.blocks[:rows] == source.blocks[:rows]
            assert prefix.num_tokens == prefix.num_mapped or prefix.source_block == source.blocks[rows]
        blocks = {block for sequence in self._known() for block in sequence.blocks}
        assert len(blocks) == (self.held_rows() if self.paged else 0), "a block is shared"
        assert sum(sequence.granted > 0 for sequence in self.sequences.values()) <= self.num_slots
        assert len(self.kept) <= self.capacity.num_retained

    def _source(self, prefix: SharedPrefix) -> KnownRequest:
        return self.kept[prefix.source] if isinstance(prefix.source, int) else self.sequences[prefix.source]

    def _copy(self, out: SchedulerOutput) -> None:
        """Of tokens that earlier steps have written: those of this step are not yet there."""
        for prefix in out.prefixes.shared:
            source, target = self._source(prefix), self.sequences[prefix.request_id]
            target.written = source.written[: prefix.num_tokens]
            if prefix.num_tokens > prefix.num_mapped:
                count = -(-prefix.num_tokens * self.capacity.token_bytes // self.capacity.page_bytes)
                self.copied.setdefault(out.step_id, []).append((source.rows, count))

    def _check_groups(self, out: SchedulerOutput) -> None:
        """All members have the tokens that they are said to share, before the step."""
        for group in out.prefix_groups:
            chunks = [out.chunks[member] for member in group.members]
            found = {tuple(self.sequences[chunk.request_id].written[: group.num_tokens]) for chunk in chunks}
            assert [len(tokens) for tokens in found] == [group.num_tokens], found
            assert all(chunk.num_tokens == 1 and chunk.start >= group.num_tokens for chunk in chunks)
        members = [member for group in out.prefix_groups for member in group.members]
        assert len(set(members)) == len(members)
        self.num_grouped += len(members)

    def _compute(self, chunk: Chunk, shared: set[Row]) -> SampledToken | None:
        """shared: rows that more than one sequence holds."""
        sequence = self.sequences[chunk.request_id]
        written, end = sequence.written, chunk.start + chunk.num_tokens
        assert written == sequence.tokens[: chunk.start], "what is in the cache are not the tokens before the chunk"
        assert chunk.num_tokens >= 1 and end <= len(sequence.tokens)
        first_row = chunk.start * self.capacity.token_bytes // self.capacity.page_bytes
        assert shared.isdisjoint(sequence.rows[first_row:]), "rows of another sequence are overwritten"
        sequence.written = sequence.tokens[:end]
        assert chunk.samples == (end == len(sequence.tokens))
        if not chunk.samples:
            return None
        sequence.tokens.append(next_token(sequence.tokens))
        return SampledToken(chunk.request_id, sequence.tokens[-1])

    def _free(self, sequence: KnownRequest) -> None:
        self._check_not_copied(sequence.rows, 0)
        self._forget(sequence)

    def _forget(self, sequence: KnownRequest) -> None:
        sequence.granted = 0
        sequence.blocks, sequence.written, sequence.rows = [], [], []

    def _check_not_copied(self, rows: list[Row], left: int) -> None:
        busy = [count for copies in self.copied.values() for source, count in copies if source is rows]
        assert max(busy, default=0) <= left, "rows go while they are copied"


def make_pair(
    config: SchedulerConfig, backend: str, capacity: CacheCapacity, max_len: int, num_micro_batches: int = 1,
    eviction: str = "lru",
) -> tuple[Scheduler, FakeWorker]:  # fmt: skip
    """A scheduler, and the worker that it drives."""
    spec = BackendSpec.parse(backend)
    manager = make_block_space_manager(spec, capacity, eviction, cascades=True)
    scheduler = make_scheduler(config, manager, max_len, num_micro_batches)
    return scheduler, FakeWorker(capacity, spec.is_paged, config.max_num_seqs)


def make_request(name: str, prompt: int | list[int], max_tokens: int | None = 16, **params: object) -> Request:
    """A request that stops at EOS unless told to ignore it. prompt: its length; it then differs from every other's."""
    if isinstance(prompt, int):
        prompt = [crc32(f"{name}.{i}".encode()) % VOCAB for i in range(prompt)]
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **params), frozenset([EOS]))


def expected_output(request: Request, max_len: int) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that is alone in the world."""
    params = request.sampling_params
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
    prompt = request.token_ids[: request.num_prompt_tokens].tolist()
    output: list[int] = []
    while True:
        output.append(next_token((*prompt, *output)))
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
