"""torch's profiler over a window of steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.schema import ProfilingConfig

logger = logging.getLogger(__name__)


@contextmanager
def profile_window(path: Path, config: ProfilingConfig) -> Iterator[Callable[[object], None]]:
    """Call what this yields after each step: steps [start_step, start_step + num_steps) are traced to `path`.

    A run that is shorter leaves a trace of what it had, or none.
    """
    import torch
    from torch import profiler

    activities = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(profiler.ProfilerActivity.CUDA)

    def export(profile: Any) -> None:
        profile.export_chrome_trace(str(path))
        logger.info("the profile of %d steps is in %s", config.num_steps, path)

    warm_up = min(config.start_step, 1)
    window = profiler.schedule(wait=config.start_step - warm_up, warmup=warm_up, active=config.num_steps, repeat=1)
    with profiler.profile(activities=activities, schedule=window, on_trace_ready=export) as profile:
        yield lambda _: profile.step()
