"""The engine's speed with random weights: prefill, decode, the static traces of the vAttention paper, short requests.

    python scripts/benchmark_engine.py --model llama-3-8b --backend fa_vattn --output DIR [--stages prefill,decode,...]

One engine a run. Rows go to DIR/engine.csv as they are known, most important first; what --budget leaves out is named.
The work is that of the peer's script: prompts of random token ids, greedy, end tokens ignored.
"""

import argparse
import csv
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from sarathi import LLM, SamplingParams
from sarathi.engine.llm_engine import LLMEngine
from sarathi.metrics.environment import environment

COLUMNS = ("model", "work", "backend", "batch", "context", "value", "unit")
PREFILL = (8192, 32768, 2048, 131072)
DECODE = ((1, 1024), (16, 1024), (64, 1024), (256, 1024), (1, 4096), (16, 4096), (64, 4096), (1, 16384), (16, 16384))
TRACES = ((50, 32768, 500), (50, 32768, 50))  # requests, prompt and output tokens of each, prompt : output
REQUESTS = "256 requests, in 100-1024, out 100-1024"
WARM_UP_TOKENS = 8
MEASURED_TOKENS = 128


class Bench:
    """One engine, and the rows that it gives."""

    def __init__(self, engine: LLMEngine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.vocab_size = engine.executor.vocab_size
        self.random = random.Random(options.seed)
        self.deadline = time.monotonic() + options.budget
        self.serial = 0
        options.output.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._write(COLUMNS)

    @property
    def path(self) -> Path:
        return self.options.output / "engine.csv"

    def record(self, work: str, batch: int, context: int, value: float, unit: str) -> None:
        """One row, on disk at once."""
        values = (self.options.model, work, self.options.backend, batch, context, f"{value:.6g}", unit)
        self._write(values)
        print(*values, flush=True)

    def _write(self, values: Sequence[object]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(values)

    def submit(self, prompt_tokens: int, output_tokens: int) -> str:
        """Queues a request of random tokens; its id."""
        self.serial += 1
        prompt = self.random.choices(range(3, self.vocab_size - 3), k=prompt_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        self.engine.add_request(str(self.serial), prompt, params)
        return str(self.serial)

    def drain(self) -> None:
        """Step until every request is done."""
        while self.engine.has_work:
            self.engine.step()

    def serve(self, requests: list[tuple[int, int]]) -> float:
        """Seconds from the first request's arrival to the last one's end."""
        start_s = time.perf_counter()
        for prompt_tokens, output_tokens in requests:
            self.submit(prompt_tokens, output_tokens)
        self.drain()
        return time.perf_counter() - start_s

    def prefill(self, context: int) -> None:
        """Median seconds of one request with a prompt of `context` tokens and one token out."""
        repeats = 3 if context <= 65536 else 2
        self.record("prefill", 1, context, statistics.median(self.serve([(context, 1)]) for _ in range(repeats)), "s")

    def decode(self, batch: int, context: int) -> None:
        """Milliseconds a step once every request of the batch decodes, over MEASURED_TOKENS steps."""
        ids = [self.submit(context, 10**6) for _ in range(batch)]
        produced = dict.fromkeys(ids, 0)
        self._step_until(produced, WARM_UP_TOKENS)
        stamps = [time.perf_counter()]
        target = min(produced.values()) + MEASURED_TOKENS
        while min(produced.values()) < target:
            self._step(produced)
            stamps.append(time.perf_counter())
        for request_id in ids:
            self.engine.abort(request_id)
        self.drain()
        steps = [1e3 * (after - before) for before, after in pairwise(stamps)]
        self.record("decode", batch, context, statistics.fmean(steps), "ms/token")
        self.record("decode p99 step", batch, context, sorted(steps)[int(0.99 * len(steps))], "ms")

    def trace(self, count: int, context: int, ratio: int) -> None:
        """Makespan of requests that arrive at once, prompt : output as ratio : 1."""
        output_tokens = max(1, round(context / (ratio + 1)))
        seconds = self.serve([(context - output_tokens, output_tokens)] * count)
        self.record(f"{count} requests, P:D {ratio}, all at once", count, context, seconds, "s")

    def requests(self) -> None:
        """Output tokens a second over short requests of uniform lengths."""
        lengths = [(self.random.randint(100, 1024), self.random.randint(100, 1024)) for _ in range(256)]
        seconds = self.serve(lengths)
        self.record(REQUESTS, 256, 1024, sum(out for _, out in lengths) / seconds, "output tokens/s")

    def _step(self, produced: dict[str, int]) -> None:
        for output in self.engine.step():
            if output.request_id in produced:
                produced[output.request_id] = len(output.outputs[0].token_ids)

    def _step_until(self, produced: dict[str, int], tokens: int) -> None:
        while min(produced.values()) < tokens:
            self._step(produced)


def plan(bench: Bench, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """What to measure, most important first."""
    longest = bench.engine.executor.max_model_len
    slots = bench.engine.scheduler.config.max_num_seqs
    for stage in options.stages:
        if stage == "prefill":
            yield from ((f"prefill {n}", lambda n=n: bench.prefill(n)) for n in PREFILL if n < longest)
        elif stage == "decode":
            shapes = [(b, n) for b, n in DECODE if b <= slots and n + 512 < longest]
            yield from ((f"decode {b} x {n}", lambda b=b, n=n: bench.decode(b, n)) for b, n in shapes)
        elif stage == "trace":
            traces = [each for each in TRACES if each[1] <= longest]
            yield from ((f"trace {each}", lambda each=each: bench.trace(*each)) for each in traces)
        elif stage == "requests":
            yield "requests", bench.requests


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--stages", type=lambda text: text.split(","), default=["prefill", "decode", "requests", "trace"]
    )
    parser.add_argument("--max-model-len", type=int, default=132_096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=8192)
    parser.add_argument("--memory-bytes", default=None, help="as 8gb; none: what is free")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; nothing starts after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/engine"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    start_s = time.perf_counter()
    llm = LLM(
        model=options.model, load_format="dummy", attention_backend=options.backend, chunk_size=options.chunk_size,
        max_model_len=options.max_model_len, max_num_seqs=options.max_num_seqs, memory_bytes=options.memory_bytes,
    )  # fmt: skip
    bench = Bench(llm.engine, options)
    bench.serve([(16, 2)])
    bench.record("start to first token", 1, 16, time.perf_counter() - start_s, "s")
    capacity = llm.engine.executor.capacity
    bench.record("KV tokens held", 1, 0, capacity.tokens_in(capacity.rows), "tokens")
    bench.serve([(2048, 8)] * 8)
    for name, measure in plan(bench, options):
        if time.monotonic() > bench.deadline:
            print(f"no time left for {name}", flush=True)
            continue
        measure()
    (options.output / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    llm.close()


if __name__ == "__main__":
    main()
