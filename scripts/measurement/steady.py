"""A time as a device takes it that has been at work for a while. Knows nothing of what is measured."""

import statistics
import time
from collections.abc import Callable


def steady(sample: Callable[[], float], seconds: float) -> float:
    """Median of the later half of the samples that so many seconds give, of at least one.

    A card at its power limit slows down under load: kernels that ran for milliseconds between pauses would look faster
    than the same kernels in an engine.
    """
    end = time.perf_counter() + seconds
    samples = [sample()]
    while time.perf_counter() < end:
        samples.append(sample())
    return statistics.median(samples[len(samples) // 2 :])
