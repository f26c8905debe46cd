"""GPU profile of decode steps: time by operation, idle share, clock and power.

Kernels are classified by name, in any engine.
"""

import re
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, schedule

from sarathi.benchmark.engines.load import Load
from sarathi.benchmark.records import Work

WARM_UP_STEPS = 3
STEPS = 10
NUM_SHAPES = 4  # the first ones of decode, at the shortest context
OPERATIONS = {  # the first whose pattern a kernel's name contains; FlashAttention's are CUTLASS's too
    "attention": re.compile("attention|flash|pagedkv|raggedkv|singleprefill|mergestate", re.IGNORECASE),
    "matrix products": re.compile("gemm|gemv|nvjet|splitk|matvec|skinny|cublas|cutlass", re.IGNORECASE),
}
ALL_ELSE = "all else"
NUM_SAMPLES = 5  # of clock and power
_MOST_STEPS = 4096  # that the samples may take


class Kernel(NamedTuple):
    """One execution of a kernel or a copy."""

    start: float  # microseconds
    end: float
    name: str


def device_work(load: Load) -> Work:
    """Measurements of the shortest decodes; none without a GPU."""
    shapes = load.decode_shapes()[:NUM_SHAPES] if torch.cuda.is_available() else []
    return ((f"device {b} x {n}", partial(measure_device, load, b, n)) for b, n in shapes)


def measure_device(load: Load, batch: int, context: int) -> None:
    """Records of one shape: milliseconds of each operation, percent of time that the GPU is idle, clock, power."""
    produced = load.start_decoding([context] * batch, _MOST_STEPS)
    step = partial(load.advance, produced)
    record = partial(load.record, batch=batch, context=context)
    measure_clock(record, step)  # first: while a trace is read the device rests
    kernels = trace(step)
    load.end(produced)
    for operation, microseconds in time_by_operation(kernels).items():
        record(f"decode step: {operation}", value=microseconds / STEPS / 1e3, unit="ms")
    record("GPU idle in a decode step", value=100 * idle_share(kernels), unit="%")


def measure_clock(record: Callable[..., object], step: Callable[[], object]) -> None:
    """Record SM clock and power while steps run. record: called with work, value and unit."""
    clock, power = clock_and_power(step)
    record("SM clock in decode steps", value=clock, unit="MHz")
    record("power in decode steps", value=power, unit="W")


def clock_and_power(step: Callable[[], object]) -> tuple[float, float]:
    """Median SM clock in MHz and power in W while steps run."""
    device = f"--id=GPU-{torch.cuda.get_device_properties('cuda').uuid}"
    query = ["nvidia-smi", device, "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits"]
    samples = []
    for _ in range(NUM_SAMPLES):
        with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as asked:
            while asked.poll() is None:
                step()
            samples.append([float(value) for value in asked.communicate()[0].split(",")])
    clocks, powers = zip(*samples, strict=True)
    return statistics.median(clocks), statistics.median(powers)


def trace(step: Callable[[], None]) -> list[Kernel]:
    """Kernels and copies of STEPS calls, sorted by start."""
    phases = schedule(wait=0, warmup=WARM_UP_STEPS, active=STEPS, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=phases) as seen:
        for _ in range(WARM_UP_STEPS + STEPS):
            step()
            seen.step()
    on_device = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    ran = [event for event in on_device if not event.name.startswith("ProfilerStep")]
    if not ran:
        raise RuntimeError("the profiler saw no kernel")
    return sorted(Kernel(event.time_range.start, event.time_range.end, event.name) for event in ran)


def time_by_operation(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Microseconds by operation. Overlapping time counts once, for the kernel that started first."""
    spent: defaultdict[str, float] = defaultdict(float)
    for kernel, alone in _alone(kernels):
        spent[operation_of(kernel.name)] += alone
    return dict(spent)


def operation_of(kernel: str) -> str:
    """The entry of OPERATIONS that a kernel belongs to, by its name."""
    return next((name for name, pattern in OPERATIONS.items() if pattern.search(kernel)), ALL_ELSE)


def idle_share(kernels: Sequence[Kernel]) -> float:
    """Fraction of the time between the first start and the last end in which nothing runs."""
    busy = sum(alone for _, alone in _alone(kernels))
    return 1 - busy / (max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels))


def _alone(kernels: Iterable[Kernel]) -> Iterator[tuple[Kernel, float]]:
    """Each kernel with the microseconds in which no earlier kernel still runs."""
    covered_to = float("-inf")
    for kernel in sorted(kernels):
        yield kernel, max(0.0, kernel.end - max(kernel.start, covered_to))
        covered_to = max(covered_to, kernel.end)
