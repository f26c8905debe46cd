"""Measure the gain of prefix caching on a CPU, and its cost when nothing is shared: prefix_cpu.csv.

    python scripts/benchmark_prefix_cpu.py [--model smollm2-135m] [--repeats 5] [--output experiments/cpu/prefix]
    python scripts/benchmark_prefix_cpu.py --test

Measures time to first token of two prompts that differ only at the end, and, with prefix caching on and off, samples of
one prompt and requests that share nothing. Random weights. Both sides alternate and a ratio is the median over pairs,
so that other load affects both; the environment file has the machine's load before the run.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sarathi import LLM, SamplingParams
from sarathi.benchmark.config.program import positive
from sarathi.benchmark.engines.ours import find_model
from sarathi.benchmark.records import Record, Table
from sarathi.entrypoints.script import run_script

SHORT = ("--model", "tiny", "--repeats", "2", "--output", "results/test/prefix_cpu")


class Shape(NamedTuple):
    """Requests that arrive together."""

    requests: int
    prompt: int  # tokens of each
    output: int


class Sizes(NamedTuple):
    """own: tokens at the end of a known prompt that differ."""

    known: int  # tokens of a prompt
    own: int
    samples: Shape
    unshared: Shape


FULL = Sizes(1500, 10, Shape(8, 512, 8), Shape(64, 32, 8))
SMALL = Sizes(128, 8, Shape(3, 64, 2), Shape(3, 32, 2))


class Pairs(NamedTuple):
    """Seconds of alternating runs."""

    ours_s: Sequence[float]
    reference_s: Sequence[float]

    @classmethod
    def measure(cls, ours: Callable[[], float], reference: Callable[[], float], repeats: int) -> "Pairs":
        """Alternate which side runs first. Discards the first pair, which warms up caches."""
        pairs = []
        for number in range(repeats + 1):
            first, second = (ours, reference) if number % 2 else (reference, ours)
            spent_s = first(), second()
            pairs.append(spent_s if number % 2 else spent_s[::-1])
        ours_s, reference_s = zip(*pairs[1:], strict=True)
        return cls(ours_s, reference_s)

    @property
    def ratio(self) -> float:
        """Speedup of ours."""
        pairs = zip(self.ours_s, self.reference_s, strict=True)
        return statistics.median(reference_s / ours_s for ours_s, reference_s in pairs)


class Measurement:
    """Records of one model with prefix caching, beside `other` without it."""

    def __init__(self, options: argparse.Namespace, llm: LLM, other: LLM, table: Table) -> None:
        self._model, self._repeats = options.model, options.repeats
        self._llm, self._other, self._table = llm, other, table
        self._random = random.Random(options.seed)
        found = llm.engine.core.facts
        self._backend, self._vocab_size = found.resolution.backend, found.vocab_size

    def first_tokens(self, length: int, own: int) -> None:
        """Measure the first token of a new prompt, then of one that differs from it only at the end."""
        pairs = []
        for _ in range(self._repeats + 1):  # the first pair, which makes caches warm, is left out
            beginning = self._tokens(length - own)
            prompts = [[*beginning, *[last] * own] for last in self._random.sample(range(self._vocab_size), 2)]
            pairs.append([self._seconds(self._llm, [prompt], 1) for prompt in prompts])
        new_s, known_s = zip(*pairs[1:], strict=True)
        new = Record(self._model, "first token", self._backend, 1, length, statistics.median(new_s), "s")
        self._table.add(new)
        known = Record(
            self._model, f"first token, all but {own} tokens known", self._backend, 1, length,
            statistics.median(known_s), "s", self._backend, Pairs(known_s, new_s).ratio,
        )  # fmt: skip
        self._table.add(known)

    def samples(self, shape: Shape) -> None:
        """Measure several samples of one prompt."""
        self._compare("samples of one prompt", shape, lambda: ([self._tokens(shape.prompt)], shape.requests))

    def unshared(self, shape: Shape) -> None:
        """Measure requests that share nothing."""
        self._compare("nothing shared", shape, lambda: ([self._tokens(shape.prompt) for _ in range(shape.requests)], 1))

    def _compare(self, work: str, shape: Shape, draw: Callable[[], tuple[list[list[int]], int]]) -> None:
        """draw: prompts, and how many samples of each."""

        def run(llm: LLM) -> float:
            prompts, samples = draw()
            return self._seconds(llm, prompts, shape.output, samples)

        pairs = Pairs.measure(lambda: run(self._llm), lambda: run(self._other), self._repeats)
        rate, context = shape.requests * shape.output / statistics.median(pairs.ours_s), shape.prompt + shape.output
        self._table.add(
            Record(
                self._model, work, self._backend, shape.requests, context, rate, "output tokens/s",
                f"{self._backend}, caching off", pairs.ratio,
            )
        )  # fmt: skip

    def _seconds(self, llm: LLM, prompts: list[list[int]], output: int, samples: int = 1) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, n=samples)
        start_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start_s

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--output", type=Path, default=Path("experiments/cpu/prefix"))
    parser.add_argument("--test", action="store_true", help="a short form: a tiny model, few tokens")
    options = parser.parse_args()
    return parser.parse_args([*SHORT, *sys.argv[1:]]) if options.test else options


def main() -> int:
    options = read_options()
    sizes, model = SMALL if options.test else FULL, find_model(options.model)
    table = Table(options.output / "prefix_cpu.csv", load_average=os.getloadavg())
    alike = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16}
    with (
        LLM(model, **alike, prefix_caching=True, memory_bytes="512mb") as llm,
        LLM(model, **alike, prefix_caching=False, memory_bytes="512mb") as other,
    ):
        measured = Measurement(options, llm, other, table)
        work = {
            "first tokens": lambda: measured.first_tokens(sizes.known, sizes.own),
            "samples": lambda: measured.samples(sizes.samples),
            "nothing shared": lambda: measured.unshared(sizes.unshared),
        }
        for name, measure in work.items():
            table.attempts.run(name, measure)
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
