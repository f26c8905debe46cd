"""The share of time in which the GPU has nothing to do. Knows no engine."""

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP_STEPS = 3


def idle_share(step: Callable[[], None], steps: int = 10) -> float:
    """1 - busy / span of the device over `steps` calls, from the first kernel's start to the last one's end."""
    phases = schedule(wait=0, warmup=WARM_UP_STEPS, active=steps, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=phases) as trace:
        for _ in range(WARM_UP_STEPS + steps):
            step()
            trace.step()
    on_device = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = [each.time_range for each in on_device if not each.name.startswith("ProfilerStep")]
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    return gaps_share((span.start, span.end) for span in spans)


def gaps_share(spans: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers."""
    ordered = sorted(spans)
    start, covered_to, busy = ordered[0][0], ordered[0][0], 0.0
    for begin, end in ordered:
        busy += max(0.0, end - max(begin, covered_to))
        covered_to = max(covered_to, end)
    return 1 - busy / (covered_to - start)
