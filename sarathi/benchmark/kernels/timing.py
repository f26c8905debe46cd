"""Timing of kernels on the device, alone and interleaved.

A CUDA graph launches the kernel on enough copies of the inputs to exceed L2; CUDA events time its replay. The result
is the cost in a decode step with a graph, including launch gaps. Without a GPU the same calls measure the CPU.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.benchmark.records import Attempts

Launch = Callable[[int], Tensor]  # index of the copy of the inputs -> result
Sample = Callable[[], float]  # microseconds of a launch, measured once
_ALL = slice(None)
L2_BYTES_TO_EXCEED = 256 * 2**20


def copies_for(bytes_each: int, limit: int = 64) -> int:
    """Number of copies of an input that exceed L2; at least 2."""
    return max(2, min(limit, -(-L2_BYTES_TO_EXCEED // max(bytes_each, 1))))


def graph_us(launch: Callable[[int], object], copies: int, *, min_launches: int = 8, replays: int = 7) -> float:
    """Median microseconds of ``launch(i)`` inside a graph; i cycles through range(copies)."""
    return _median_us(graph_sample(launch, copies, min_launches=min_launches), replays)


def eager_us(launch: Callable[[int], object], copies: int, *, replays: int = 5) -> float:
    """Median microseconds of ``launch(i)`` from Python, for kernels much longer than their launch."""
    return _median_us(eager_sample(launch, copies), replays)


def compare_us(
    attempts: Attempts,
    launches: Iterable[tuple[str, Callable[[], Launch]]],
    expected: Tensor,
    sample: Callable[[Launch], Sample],
    *,
    checked: Tensor | slice = _ALL,
    rounds: int = 7,
) -> dict[str, float]:
    """Interleaved microseconds by name. Reports and skips kernels that fail or whose rows `checked` are wrong."""
    ready = {name: attempts.run(name, partial(_ready, make, expected, checked, sample)) for name, make in launches}
    return in_turn_us({name: each for name, each in ready.items() if each is not None}, rounds)


def _ready(
    make: Callable[[], Launch], expected: Tensor, checked: Tensor | slice, sample: Callable[[Launch], Sample]
) -> Sample:
    launch = make()
    error = ((launch(0)[checked].double() - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise ValueError(f"wrong result, error {error:.1e}")
    return sample(launch)


def in_turn_us(samples: Mapping[str, Sample], rounds: int) -> dict[str, float]:
    """Median microseconds of several kernels, each measured once per round.

    A GPU at its power limit slows down under load: without interleaving, the first kernels would look faster.
    """
    taken = [{name: sample() for name, sample in samples.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(each[name] for each in taken[1:]) for name in samples}


def graph_sample(launch: Callable[[int], object], copies: int, *, min_launches: int = 8) -> Sample:
    """A replayable graph of ``launch(i)`` over the copies."""
    launches = copies * -(-min_launches // copies)

    def all_launches() -> None:
        for number in range(launches):
            launch(number % copies)

    if not torch.cuda.is_available():
        return lambda: _host_us(all_launches) / launches
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy in range(min(copies, 2)):
            launch(copy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_launches()
    return _Replay(graph, launches, launch)


def eager_sample(launch: Callable[[int], object], copies: int) -> Sample:
    """A function that calls ``launch(i)`` on the next copy each time."""
    calls = itertools.count()
    clock = _device_us if torch.cuda.is_available() else _host_us
    return lambda: clock(lambda: launch(next(calls) % copies))


class _Replay(NamedTuple):
    """A graph to be timed; `launch` keeps its input tensors alive."""

    graph: torch.cuda.CUDAGraph
    launches: int
    launch: Callable[[int], object]

    def __call__(self) -> float:
        return _device_us(self.graph.replay) / self.launches


def _median_us(sample: Sample, replays: int) -> float:
    sample()
    return statistics.median(sample() for _ in range(replays))


def _device_us(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _host_us(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return (time.perf_counter() - start_s) * 1e6


def steady(sample: Callable[[], float], seconds: float) -> float:
    """Sample for `seconds`, at least once; returns the median of the second half.

    A GPU at its power limit slows down under load: short bursts of kernels would look faster than in an engine.
    """
    end = time.perf_counter() + seconds
    samples = [sample()]
    while time.perf_counter() < end:
        samples.append(sample())
    return statistics.median(samples[len(samples) // 2 :])
