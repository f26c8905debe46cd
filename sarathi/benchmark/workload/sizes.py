"""The work that engines are measured on, as numbers. Knows no engine: both sides of a comparison take it from here."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

Requests = list[tuple[int, int]]  # prompt tokens, output tokens


class Sizes(NamedTuple):
    """What a whole measurement takes."""

    prefill: tuple[int, ...]  # prompt tokens
    chunk: int  # tokens of a step in the chunked form
    decode: tuple[tuple[int, int], ...]  # batch, context
    decode_steps: int
    uniform: tuple[int, int, int]  # requests, fewest and most tokens, of prompts and of outputs alike
    lognormal_requests: int
    traces: tuple[tuple[int, int, int], ...]  # requests, tokens of each, prompt tokens for one output token
    steady_s: float  # seconds over which work of less is done again and again (steady.py)

    def with_ratios(self, ratios: Sequence[int]) -> "Sizes":
        """Only the traces of these ratios of prompt to output."""
        return self._replace(traces=tuple(trace for trace in self.traces if trace[2] in ratios))

    @property
    def chunked_work(self) -> str:
        """What rows of prefill in the chunked form are called."""
        return f"prefill, {self.chunk} tokens a step"


FULL = Sizes(
    prefill=(8192, 32768, 2048, 131072),
    chunk=2048,
    decode=(
        (1, 1024), (16, 1024), (64, 1024), (256, 1024), (1, 4096), (16, 4096), (64, 4096), (256, 4096),
        (1, 16384), (16, 16384), (64, 16384),
    ),
    decode_steps=128,
    uniform=(256, 100, 1024),
    lognormal_requests=1000,
    traces=((50, 32768, 500), (50, 32768, 50)),
    steady_s=2.0,
)  # fmt: skip
SMALL = Sizes(
    prefill=(64, 128), chunk=32, decode=((1, 32), (4, 32)), decode_steps=8, uniform=(4, 8, 24),
    lognormal_requests=6, traces=((3, 64, 15),), steady_s=0.05,
)  # fmt: skip


def uniform_requests(sizes: Sizes, seed: int) -> Requests:
    """Prompts and outputs uniform between the limits; the same for the same seed."""
    count, low, high = sizes.uniform
    source = random.Random(seed)
    return [(source.randint(low, high), source.randint(low, high)) for _ in range(count)]


def lognormal_requests(sizes: Sizes, seed: int, longest: int) -> Requests:
    """Lengths like those of chats: a median prompt of 230 tokens and a median output of 190, with long tails."""
    source = random.Random(seed)

    def draw(median: float, sigma: float, high: int) -> int:
        drawn = round(source.lognormvariate(math.log(median), sigma))
        return min(max(4, drawn), high, longest // 2)

    return [(draw(230, 1.1, 4096), draw(190, 0.9, 2048)) for _ in range(sizes.lognormal_requests)]


def chat_lengths(count: int, seed: int) -> list[int]:
    """Tokens of requests like those of lognormal_requests, each somewhere in its output."""
    source = random.Random(seed)
    requests = lognormal_requests(FULL._replace(lognormal_requests=count), seed, 2**17)
    return [prompt + 1 + source.randrange(output) for prompt, output in requests]


def trace_requests(count: int, tokens: int, ratio: int) -> Requests:
    """Equal requests of so many tokens, prompt : output as ratio : 1."""
    output = max(1, round(tokens / (ratio + 1)))
    return [(tokens - output, output)] * count
