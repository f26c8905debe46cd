"""Run an engine under random arrivals, lengths, aborts and preemptions, and check its accounting and memory.

    python scripts/soak.py --model llama-3-8b --backend fa_vattn --memory-bytes 6gb --seconds 200 --output DIR
    python scripts/soak.py --test        # 10 seconds on the CPU with a tiny model

Exit code 1 if an integrity check fails, a request returns a wrong number of tokens, the cache exceeds its budget, other
memory grows, or nothing was preempted. Writes soak.csv.
"""

import argparse
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from sarathi import SamplingParams
from sarathi.benchmark.config.program import engine_parser, parse
from sarathi.benchmark.engines.ours import OurEngine, open_engine
from sarathi.benchmark.records import Record, Table
from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.script import run_script

CHECK_S = 0.5
ARRIVALS = 0.4  # of all steps, those before which a request arrives, and again as often another one
BURSTS = 0.005  # of all steps, those before which as many arrive as may be there at all
DRAIN_S = 10.0  # every so often all requests are let end, so that nothing may be held by any
WARM_UP_SHARE = 0.3  # of the time; what memory is in use then is what it is measured against
GROWTH_BYTES = {"host memory": 256 * 2**20, "driver memory outside of the cache": 64 * 2**20}
HOLD_BYTES = 1 * 2**30  # torch keeps what the largest steps so far took


class Violation(Exception):
    """An invariant is violated."""


class Soak:
    """Random work for one engine."""

    def __init__(self, engine: OurEngine, seed: int) -> None:
        self._front, self._engine = engine, engine.engine
        self._random = random.Random(seed)
        self._asked: dict[str, int] = {}
        self._baseline: dict[str, int] = {}
        self._longest = min(engine.max_model_len, engine.capacity_tokens)
        self.counts: Counter[str] = Counter()
        self.growth: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        """Run until the time is up and all requests have ended. Violation, or RuntimeError of an integrity check."""
        start_s = time.monotonic()
        next_check_s, next_drain_s = start_s, start_s + DRAIN_S
        while (now_s := time.monotonic()) < start_s + seconds:
            self._arrive()
            self._abort_some()
            self._step()
            if now_s >= next_drain_s:
                self._drain()
                next_drain_s = now_s + DRAIN_S
            if now_s >= next_check_s:
                self._check(is_warm=now_s > start_s + WARM_UP_SHARE * seconds)
                next_check_s = now_s + CHECK_S
        self._drain()
        if not self._front.num_preemptions:
            raise Violation("no request was preempted: give the cache less memory")

    def _arrive(self) -> None:
        """Add single requests, and bursts of more than can run, to cause preemptions."""
        limit = 2 * self._front.max_num_seqs
        more = 1.0 if self._random.random() < BURSTS else ARRIVALS
        while len(self._asked) < limit and self._random.random() < more:
            prompt, output = self._lengths()
            request_id = str(self.counts["requests"])
            token_ids = self._random.choices(range(3, self._front.vocab_size - 3), k=prompt)
            self._engine.add_request(request_id, token_ids, self._params(output))
            self._asked[request_id] = output
            self.counts["requests"] += 1

    def _lengths(self) -> tuple[int, int]:
        """Prompt and output tokens: mostly short, some near the cache's capacity."""
        prompt = min(int(self._random.lognormvariate(4.5, 1.3)) + 1, self._longest // 2)
        output = min(int(self._random.lognormvariate(4.0, 1.0)) + 1, self._longest // 3)
        return prompt, output

    def _params(self, output: int) -> SamplingParams:
        sampled = {"temperature": 0.8, "top_p": 0.9, "seed": self._random.randrange(1000)}
        chosen = sampled if self._random.random() < 0.1 else {"temperature": 0.0}
        return SamplingParams(max_tokens=output, ignore_eos=True, **chosen)

    def _abort_some(self) -> None:
        if self._asked and self._random.random() < 0.05:
            request_id = self._random.choice(list(self._asked))
            self._engine.abort(request_id)
            del self._asked[request_id]
            self.counts["aborts"] += 1

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished and output.request_id in self._asked:
                self._take(output)
        self.counts["steps"] += 1

    def _take(self, output: RequestOutput) -> None:
        asked, got = self._asked.pop(output.request_id), len(output.outputs[0].token_ids)
        if got != asked:
            reason = output.outputs[0].finish_reason
            raise Violation(f"request {output.request_id} asked for {asked} tokens and got {got} ({reason})")
        self.counts["output tokens"] += got

    def _drain(self) -> None:
        while self._engine.has_work:
            self._step()
        if self._asked:
            raise Violation(f"requests that never ended: {sorted(self._asked)[:5]}")
        stats = self._front.memory_stats()
        if stats.mapped_bytes != stats.idle_bytes:
            raise Violation(f"{stats.mapped_bytes - stats.idle_bytes} bytes are held by no request")

    def _check(self, *, is_warm: bool) -> None:
        self._front.check_integrity()
        self.counts["checks"] += 1
        created, budget = self._front.memory_stats().created_bytes, self._front.budget_bytes
        if created > budget:
            raise Violation(f"the cache holds {created} bytes, its budget is {budget}")
        for name, used in memory_in_use(created):
            limit = GROWTH_BYTES.get(name, HOLD_BYTES)
            self.growth[name] = max(self.growth[name], used - self._baseline.get(name, used))
            if not is_warm:
                self._baseline[name] = max(used, self._baseline.get(name, used))
                self.growth[name] = 0
            elif self.growth[name] > limit:
                raise Violation(f"{name} grew by {self.growth[name]} bytes after the warm-up, more than {limit}")


def memory_in_use(cache_bytes: int) -> Iterator[tuple[str, int]]:
    """Memory to check for leaks, in bytes. Excludes shared memory, which holds the host's cache pages."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    yield "host memory", int(status["RssAnon"].split()[0]) * 1024
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        yield "driver memory outside of the cache", total - free - cache_bytes - held
        yield "memory held by torch", held


def save(options: argparse.Namespace, soak: Soak, engine: OurEngine, verdict: str) -> None:
    """Write the counters of the run, and the growth of memory after the warm-up."""
    table = Table(options.output / "soak.csv", verdict=verdict)
    stats = engine.memory_stats()
    facts = {"preemptions": engine.num_preemptions, "steps that waited": stats.steps_waited, **soak.counts}
    shape = (options.backend, options.max_num_seqs, options.max_model_len)
    for name, value in facts.items():
        table.add(Record(options.model, f"soak of {options.seconds:g} s: {name}", *shape, value, name))
    for name, value in soak.growth.items():
        table.add(Record(options.model, f"growth of {name}", *shape, value, "bytes"))


def main() -> int:
    parser = engine_parser(__doc__, "results/soak")
    parser.set_defaults(model="tiny", max_model_len=4096, max_num_seqs=64, chunk_size=2048, memory_bytes="1gb")
    parser.add_argument("--seconds", type=float, default=200.0)
    options = parse(parser, {"seconds": 10.0, "memory_bytes": "3mb"})
    logging.getLogger("sarathi").setLevel(logging.ERROR)  # preemptions are what is wanted here
    engine = open_engine(options, options.backend)
    print(f"# seed {options.seed}, {engine.capacity_tokens} tokens of cache", flush=True)
    soak, verdict = Soak(engine, options.seed), "passed"
    try:
        soak.run(options.seconds)
    except (Violation, RuntimeError) as error:
        verdict = f"{type(error).__name__}: {error}"
    save(options, soak, engine, verdict)
    engine.close()
    print(verdict, flush=True)
    return int(verdict != "passed")


if __name__ == "__main__":
    run_script(main)
