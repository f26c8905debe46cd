"""Sizes of the workloads, equal for both sides of a comparison."""

from collections.abc import Sequence
from typing import NamedTuple

from sarathi.benchmark.workload.lengths import Requests, lognormal_requests, uniform_requests


class Sizes(NamedTuple):
    """Sizes of a full measurement."""

    prefill: tuple[int, ...]  # prompt tokens
    chunk: int  # tokens of a step in the chunked form
    decode: tuple[tuple[int, int], ...]  # batch, context
    decode_steps: int
    uniform: tuple[int, int, int]  # requests, fewest and most tokens, of prompts and of outputs alike
    lognormal_requests: int
    traces: tuple[tuple[int, int, int], ...]  # requests, tokens of each, prompt tokens for one output token
    steady_s: float  # seconds over which shorter work is repeated (kernels.timing.steady)

    def with_ratios(self, ratios: Sequence[int]) -> "Sizes":
        """Only the traces with these prompt-to-output ratios."""
        return self._replace(traces=tuple(trace for trace in self.traces if trace[2] in ratios))

    def uniform_requests(self, seed: int) -> Requests:
        """Prompts and outputs uniform between the limits."""
        return uniform_requests(*self.uniform, seed)

    def chat_requests(self, seed: int, longest: int) -> Requests:
        """Chat-like lengths."""
        return lognormal_requests(self.lognormal_requests, seed, longest)

    @property
    def chunked_work(self) -> str:
        """Name of chunked prefill in records."""
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
