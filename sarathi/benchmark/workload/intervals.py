"""Arrival times of a synthetic workload, in seconds after the first request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sarathi.benchmark.config.schema import BenchmarkConfig, TraceRequestIntervalGeneratorConfig
from sarathi.benchmark.workload.csv_traces import read_rows
from sarathi.benchmark.workload.text_files import make_all, seconds_of

Seconds = npt.NDArray[np.float64]


def make_arrivals(config: BenchmarkConfig, count: int, rng: np.random.Generator) -> Seconds:
    """`count` ascending arrival times from the configured provider, the first 0."""
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
    """Gamma-distributed intervals with mean 1 / qps and coefficient of variation cv; 1: Poisson, 0: constant rate."""
    if cv == 0:
        return np.arange(count) / qps
    shape = cv**-2
    gaps = rng.gamma(shape, 1.0 / (qps * shape), count - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)])


def trace_arrivals(config: TraceRequestIntervalGeneratorConfig, count: int) -> Seconds:
    """The first `count` arrivals of a file within the configured window. ValueError if there are fewer."""
    if config.trace_file is None:
        raise ValueError("trace_request_interval_generator.trace_file is none: a trace of intervals needs a file")
    times = sorted(_read_times(Path(config.trace_file)))
    low = -np.inf if config.start_time is None else seconds_of(config.start_time)
    high = np.inf if config.end_time is None else seconds_of(config.end_time)
    inside = np.array([at_s for at_s in times if low < at_s < high][:count])
    if len(inside) < count:
        raise ValueError(
            f"trace_request_interval_generator: {config.trace_file!r} has {len(inside)} arrivals in its window, "
            f"and {count} are asked for"
        )
    return np.asarray((inside - inside[0]) * config.time_scale_factor, dtype=np.float64)


def _read_times(path: Path) -> list[float]:
    rows = read_rows(path)
    if rows and "arrival_time" not in rows[0]:
        raise ValueError(f"{str(path)!r} has the columns {', '.join(rows[0])}: arrival_time must be one of them")
    return make_all(path, rows, lambda row: seconds_of(row["arrival_time"]))
