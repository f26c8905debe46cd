"""Arrival times of a synthetic workload, in seconds after the first request. Knows no lengths."""

from __future__ import annotations

import csv
import math
import re
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sarathi.benchmark.config.schema import BenchmarkConfig, TraceRequestIntervalGeneratorConfig

Seconds = npt.NDArray[np.float64]


def make_arrivals(config: BenchmarkConfig, count: int, rng: np.random.Generator) -> Seconds:
    """`count` rising times, the first of them 0, by the configured provider."""
    provider = config.synthetic_request_generator.interval_provider
    if provider == "static":
        return np.zeros(count)
    if provider == "trace":
        return trace_arrivals(config.trace_request_interval_generator, count)
    if provider == "poisson":
        return gamma_arrivals(config.poisson_request_interval_generator.qps, 1.0, count, rng)
    gamma = config.gamma_request_interval_generator
    return gamma_arrivals(gamma.qps, gamma.cv, count, rng)


def gamma_arrivals(qps: float, cv: float, count: int, rng: np.random.Generator) -> Seconds:
    """Intervals of mean 1 / qps whose standard deviation is cv times that; cv 1 is a Poisson process, 0 an even one."""
    if cv == 0:
        return np.arange(count) / qps
    shape = cv**-2
    gaps = rng.gamma(shape, 1.0 / (qps * shape), count - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)])


def trace_arrivals(config: TraceRequestIntervalGeneratorConfig, count: int) -> Seconds:
    """The first `count` arrivals of a file within its window. ValueError where it has fewer."""
    if config.trace_file is None:
        raise ValueError("trace_request_interval_generator.trace_file is none: a trace of intervals needs a file")
    times = sorted(_read_times(Path(config.trace_file)))
    low = -np.inf if config.start_time is None else _seconds(config.start_time)
    high = np.inf if config.end_time is None else _seconds(config.end_time)
    inside = np.array([at_s for at_s in times if low < at_s < high][:count])
    if len(inside) < count:
        raise ValueError(
            f"trace_request_interval_generator: {config.trace_file!r} has {len(inside)} arrivals in its window, "
            f"and {count} are asked for"
        )
    return np.asarray((inside - inside[0]) * config.time_scale_factor, dtype=np.float64)


def _read_times(path: Path) -> list[float]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if "arrival_time" not in (rows.fieldnames or ()):
            raise ValueError(f"{str(path)!r} has the columns {rows.fieldnames}: arrival_time must be one of them")
        return [_seconds(row["arrival_time"]) for row in rows]


def _seconds(text: str) -> float:
    """Seconds written as a number, or a date with a time as seconds since 1970; without a zone it is UTC's."""
    for read in (float, _seconds_of_date):
        with suppress(TypeError, ValueError):
            if math.isfinite(seconds := read(text)):
                return seconds
    raise ValueError(f"{text!r} is no time: write seconds, or as 2024-05-01 12:00:00")


def _seconds_of_date(text: str) -> float:
    at = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))  # Python 3.10 takes no more than microseconds
    return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp()
