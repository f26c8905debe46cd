"""From a configuration to a list of requests. Knows no engine; the same configuration and seed give the same list."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from sarathi.benchmark.config.schema import BenchmarkConfig, TraceRequestGeneratorConfig
from sarathi.benchmark.workload.datasets import CountTokens, read_arrivals
from sarathi.benchmark.workload.intervals import make_arrivals
from sarathi.benchmark.workload.lengths import make_lengths
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.config.knobs import ConfigError, knobs_of

LENGTHS, ARRIVALS = range(2)


def generate_requests(config: BenchmarkConfig, count_tokens: CountTokens | None = None) -> list[RequestSpec]:
    """The workload, in order of arrival, the first request at time zero.

    Lengths and arrivals are drawn from streams of their own: another rate leaves the lengths as they are.
    """
    _check_finite(config)
    if config.request_generator.provider == "trace":
        return replay(config.trace_request_generator)
    count = config.synthetic_request_generator.num_requests
    specs = make_lengths(config, count, np.random.default_rng([config.seed, LENGTHS]), count_tokens)
    arrivals = make_arrivals(config, count, np.random.default_rng([config.seed, ARRIVALS]))
    return [replace(spec, arrived_at_s=float(at_s)) for spec, at_s in zip(specs, arrivals, strict=True)]


def _check_finite(config: BenchmarkConfig) -> None:
    """A rate may be infinite: all at once. No other number can be."""
    for each in knobs_of(BenchmarkConfig):
        section, _, name = each.path.rpartition(".")
        value = getattr(getattr(config, section), name) if section.endswith("_generator") else None
        if value == math.inf and name != "qps":
            raise ConfigError(f"{each.path} is {value}: it must be finite")


def replay(config: TraceRequestGeneratorConfig) -> list[RequestSpec]:
    """A file's requests at its own times, scaled; one that is too long loses prompt tokens."""
    if config.trace_file is None:
        raise ValueError("trace_request_generator.trace_file is none: replay needs a file")
    found = sorted(read_arrivals(config.trace_file, config.date), key=lambda spec: spec.arrived_at_s)
    if not found:
        raise ValueError(f"trace_request_generator.trace_file is {config.trace_file!r}: it holds no request")
    return [_scale(spec, config, found[0].arrived_at_s) for spec in found]


def _scale(spec: RequestSpec, config: TraceRequestGeneratorConfig, origin_s: float) -> RequestSpec:
    output = min(max(int(spec.num_decode_tokens * config.decode_scale_factor), 1), config.max_tokens - 1)
    prompt = min(max(int(spec.num_prefill_tokens * config.prefill_scale_factor), 1), config.max_tokens - output)
    arrived_at_s = (spec.arrived_at_s - origin_s) * config.time_scale_factor
    return replace(spec, arrived_at_s=arrived_at_s, num_prefill_tokens=prompt, num_decode_tokens=output)
