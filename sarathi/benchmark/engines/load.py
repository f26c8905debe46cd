"""Workloads for any engine behind a small interface, ours or vLLM."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from sarathi.benchmark.engines.sizes import Sizes
from sarathi.benchmark.kernels.timing import steady
from sarathi.benchmark.records import Record, Table, Work
from sarathi.benchmark.workload.lengths import Requests, trace_requests

WARM_UP_TOKENS = 8
_STEP_SIZES = (16, 64, 256, 512, 1024, math.inf)
STAGES = ("prefill", "decode", "requests", "trace", "chunked")


class Engine(Protocol):
    """Interface of a measured engine. Requests decode greedily and ignore end tokens."""

    backend: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    capacity_tokens: int

    @property
    def has_work(self) -> bool: ...

    def add(self, prompt: list[int], output_tokens: int) -> str:
        """Queue a request; returns its id."""

    def step(self) -> Iterable[tuple[str, Sequence[int]]]:
        """Run one step; returns the new tokens of each request."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests and release their memory."""

    def limit_step(self, tokens: int | None) -> None:
        """Set the token budget of a step; None: the initial one. Requires an idle engine."""


class Decoding(NamedTuple):
    """Steps in which every request of a batch decodes."""

    steps_ms: list[float]
    ms_per_token: float
    mean_context: float


class Step(NamedTuple):
    """A step as seen through its outputs; the next step may be running already."""

    seconds: float  # since the previous step, or since the first request's arrival
    sequences: int  # number of requests with a new token
    has_prompts: bool  # a request got its first token, or none got a token

    @property
    def kind(self) -> str:
        """Category for sums over steps."""
        if self.has_prompts:
            return "steps with prompts"
        return f"steps of up to {next(bound for bound in _STEP_SIZES if self.sequences <= bound)} sequences"


class Load:
    """Runs requests of random tokens on one engine, and records their times."""

    def __init__(self, engine: Engine, table: Table, model: str, sizes: Sizes, seed: int = 0) -> None:
        self.engine, self.table, self.model, self.sizes, self.seed = engine, table, model, sizes, seed
        self.contexts: dict[Record, float] = {}  # of rows of prefill, and the mean over the steps of rows of decode
        self._random = random.Random(seed)

    def record(self, work: str, batch: int, context: int, value: float, unit: str) -> Record:
        row = Record(self.model, work, self.engine.backend, batch, context, value, unit)
        self.table.add(row)
        return row

    def prompt(self, tokens: int) -> list[int]:
        return self._random.choices(range(3, self.engine.vocab_size - 3), k=tokens)

    def drain(self) -> None:
        """Step until every request is done."""
        while self.engine.has_work:
            self.engine.step()

    def serve(self, requests: Requests) -> float:
        """Seconds from the first arrival to the end of the last request."""
        return sum(step.seconds for step in self.steps(requests))

    def steps(self, requests: Requests) -> Iterator[Step]:
        """Steps until all of these requests, which arrive at once, have ended."""
        made = [(self.prompt(prompt_tokens), output_tokens) for prompt_tokens, output_tokens in requests]
        before_s = time.perf_counter()
        for prompt, output_tokens in made:
            self.engine.add(prompt, output_tokens)
        begun: set[str] = set()
        while self.engine.has_work:
            got = [request_id for request_id, _ in self.engine.step()]
            now_s = time.perf_counter()
            yield Step(now_s - before_s, len(got), not got or not begun.issuperset(got))
            begun.update(got)
            before_s = now_s

    def start(self, age_s: Callable[[], float]) -> None:
        """Record start-up time and capacity. age_s: seconds since the process started."""
        self.serve([(16, 2)])
        self.record("start to first token", 1, 16, age_s(), "s")
        self.record("KV tokens held", 1, 0, self.engine.capacity_tokens, "tokens")
        self.warm_up()

    def warm_up(self) -> None:
        """Run every code path once: several prompts in a step, then decodes."""
        self.serve([(self.sizes.prefill[-2] // 2, WARM_UP_TOKENS)] + [(16, WARM_UP_TOKENS)] * 7)

    def start_decoding(self, prompts: Sequence[int], steps: int) -> dict[str, int]:
        """Run these prompts until all decode, with `steps` tokens left for each; returns tokens so far by id."""
        slack = 2 * WARM_UP_TOKENS + 64 + sum(prompts) // 1024  # steps in which not all of them decode yet
        produced = {self.engine.add(self.prompt(tokens), steps + slack): 0 for tokens in prompts}
        while min(produced.values()) < WARM_UP_TOKENS:
            self.advance(produced)
        return produced

    def advance(self, produced: dict[str, int]) -> None:
        """Run one step and count its tokens."""
        for request_id, tokens in self.engine.step():
            if request_id in produced:
                produced[request_id] += len(tokens)

    def timed(self, produced: dict[str, int], steps: int) -> list[float]:
        """Milliseconds of each step until every request has `steps` more tokens."""
        stamps = [time.perf_counter()]
        target = min(produced.values()) + steps
        while min(produced.values()) < target:
            self.advance(produced)
            stamps.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in pairwise(stamps)]

    def end(self, produced: dict[str, int]) -> None:
        self.engine.abort(list(produced))
        self.drain()

    def decoding(self, prompts: Sequence[int], steps: int) -> Decoding:
        """Time `steps` decode steps of all these prompts together."""
        produced = self.start_decoding(prompts, steps)
        before = sum(produced.values())
        steps_ms = self.timed(produced, steps)
        tokens = sum(produced.values()) - before
        self.end(produced)
        middle = (sum(prompts) + before + tokens / 2) / len(prompts)
        return Decoding(steps_ms, sum(steps_ms) * len(prompts) / tokens, middle)

    # What a row is made of.

    def prefill(self, context: int, work: str = "prefill") -> None:
        """Seconds of one request with a prompt of `context` tokens and one output token, run one at a time."""
        seconds = steady(lambda: self.serve([(context, 1)]), self.sizes.steady_s)
        row = self.record(work, 1, context, seconds, "s")
        self.contexts[row] = context

    def decode(self, batch: int, context: int) -> None:
        """Milliseconds per token over sizes.decode_steps."""
        found = self.decoding([context] * batch, self.sizes.decode_steps)
        row = self.record("decode", batch, context, found.ms_per_token, "ms/token")
        self.contexts[row] = found.mean_context
        p99_ms = float(np.quantile(found.steps_ms, 0.99, method="higher"))
        self.record("decode p99 step", batch, context, p99_ms, "ms")

    def makespan(self, count: int, tokens: int, ratio: int) -> None:
        seconds = self.serve(trace_requests(count, tokens, ratio))
        self.record(f"{count} requests, P:D {ratio}, all at once", count, tokens, seconds, "s")

    def throughput(self, work: str, requests: Requests) -> None:
        """Output tokens per second of requests that all arrive at once, and the time by kind of step."""
        longest = max(map(sum, requests))
        spent_s: defaultdict[str, float] = defaultdict(float)
        for step in self.steps(requests):
            spent_s[step.kind] += step.seconds
        rate = sum(out for _, out in requests) / sum(spent_s.values())
        self.record(work, len(requests), longest, rate, "output tokens/s")
        for kind, seconds in spent_s.items():
            self.record(f"{work}: {kind}", len(requests), longest, seconds, "s")

    def chunked_prefill(self) -> None:
        """Measure prefill in chunks; restores the engine's token budget afterwards."""
        self.engine.limit_step(self.sizes.chunk)
        self.serve([(self.sizes.chunk * 2, 1)])
        for context in self._prompts():
            self.prefill(context, self.sizes.chunked_work)
        self.engine.limit_step(None)

    # What to measure.

    def plan(self, stages: Sequence[str]) -> Work:
        """Work in the order of `stages`; within a stage the most important first."""
        makers: dict[str, Callable[[], Iterator[tuple[str, Callable[[], None]]]]] = {
            "prefill": lambda: ((f"prefill {n}", partial(self.prefill, n)) for n in self._prompts()),
            "chunked": lambda: iter([("chunked prefill", self.chunked_prefill)]),
            "decode": lambda: ((f"decode {b} x {n}", partial(self.decode, b, n)) for b, n in self.decode_shapes()),
            "requests": self._short_requests,
            "trace": self._traces,
        }
        for stage in stages:
            yield from makers[stage]()

    def decode_shapes(self) -> list[tuple[int, int]]:
        """The decode shapes that fit in the cache, including the measured steps."""
        room = self.sizes.decode_steps + 2 * WARM_UP_TOKENS + 256
        engine = self.engine
        return [
            (batch, context)
            for batch, context in self.sizes.decode
            if batch <= engine.max_num_seqs
            and context + room <= engine.max_model_len
            and batch * (context + room) <= engine.capacity_tokens
        ]

    def _prompts(self) -> list[int]:
        longest = min(self.engine.max_model_len, self.engine.capacity_tokens)
        return [tokens for tokens in self.sizes.prefill if tokens < longest]

    def _short_requests(self) -> Iterator[tuple[str, Callable[[], None]]]:
        count, low, high = self.sizes.uniform
        work = f"{count} requests, in {low}-{high}, out {low}-{high}"
        yield work, partial(self.throughput, work, self.sizes.uniform_requests(self.seed))
        work = f"{self.sizes.lognormal_requests} requests, in ~ lognormal 230, out ~ lognormal 190"
        longest = self.engine.max_model_len
        yield work, partial(self.throughput, work, self.sizes.chat_requests(self.seed, longest))

    def _traces(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for trace in self.sizes.traces:
            if trace[1] <= self.engine.max_model_len:
                yield f"trace {trace}", partial(self.makespan, *trace)
