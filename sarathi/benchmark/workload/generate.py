"""Generate requests from a configuration, deterministically given the seed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sarathi.benchmark.config.schema import BenchmarkConfig, TraceRequestGeneratorConfig
from sarathi.benchmark.workload.csv_traces import read_timed_csv
from sarathi.benchmark.workload.intervals import make_arrivals
from sarathi.benchmark.workload.json_lines import read_json_lines
from sarathi.benchmark.workload.lengths import make_lengths
from sarathi.benchmark.workload.sharing import is_later_turn
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.benchmark.workload.text_files import format_of
from sarathi.benchmark.workload.texts import CountTokens
from sarathi.config.knobs import ConfigError, knobs_of

LENGTHS, ARRIVALS = range(2)
DEFAULT_REQUESTS = 64  # of a synthetic workload
logger = logging.getLogger(__name__)


def generate_requests(config: BenchmarkConfig, count_tokens: CountTokens | None = None) -> list[RequestSpec]:
    """The workload in order of arrival, the first request at time zero. Turns of a conversation are adjacent.

    Lengths and arrivals use separate random streams: another rate does not change the lengths.
    """
    _check_finite(config)
    count = config.synthetic_request_generator.num_requests
    if config.request_generator.provider == "trace":
        return replay(config.trace_request_generator, count)
    count = count or DEFAULT_REQUESTS
    specs = make_lengths(config, count, np.random.default_rng([config.seed, LENGTHS]), count_tokens)
    begins = [number for number, spec in enumerate(specs) if not is_later_turn(specs, number)]
    arrivals = make_arrivals(config, len(begins), np.random.default_rng([config.seed, ARRIVALS]))
    for number, at_s in zip(begins, arrivals, strict=True):
        specs[number] = replace(specs[number], arrived_at_s=float(at_s))
    return specs


def _check_finite(config: BenchmarkConfig) -> None:
    """Rates may be infinite (all requests at once), other numbers may not."""
    for each in knobs_of(BenchmarkConfig):
        section, _, name = each.path.rpartition(".")
        value = getattr(getattr(config, section), name) if section.endswith("_generator") else None
        if value == math.inf and name != "qps":
            raise ConfigError(f"{each.path} is {value}: it must be finite")


def replay(config: TraceRequestGeneratorConfig, count: int | None = None) -> list[RequestSpec]:
    """Replay a file's requests at its scaled arrival times. Prompts of too long requests are truncated.

    count: number of requests; None: all. Logs a warning about skipped or truncated requests.
    """
    if config.trace_file is None:
        raise ValueError("trace_request_generator.trace_file is none: replay needs a file")
    found = sorted(read_arrivals(config.trace_file, config.date), key=lambda spec: spec.arrived_at_s)
    if not found:
        raise ValueError(f"trace_request_generator.trace_file is {config.trace_file!r}: it holds no request")
    if count is not None and count < len(found):
        logger.warning("num_requests cuts the replay to the first %d of %d requests", count, len(found))
    taken = found[:count]
    _tell_cut(taken, config)
    return [_scale(spec, config, found[0].arrived_at_s) for spec in taken]


def _tell_cut(specs: Sequence[RequestSpec], config: TraceRequestGeneratorConfig) -> None:
    factors = config.prefill_scale_factor, config.decode_scale_factor
    totals = [int(spec.num_prefill_tokens * factors[0]) + int(spec.num_decode_tokens * factors[1]) for spec in specs]
    if num_cut := sum(total > config.max_tokens for total in totals):
        logger.warning("prompts of %d of %d requests are cut to max_tokens %d", num_cut, len(specs), config.max_tokens)


def _scale(spec: RequestSpec, config: TraceRequestGeneratorConfig, origin_s: float) -> RequestSpec:
    output = min(max(int(spec.num_decode_tokens * config.decode_scale_factor), 1), config.max_tokens - 1)
    prompt = min(max(int(spec.num_prefill_tokens * config.prefill_scale_factor), 1), config.max_tokens - output)
    arrived_at_s = (spec.arrived_at_s - origin_s) * config.time_scale_factor
    return replace(spec, arrived_at_s=arrived_at_s, num_prefill_tokens=prompt, num_decode_tokens=output)


def read_arrivals(name: str, date: str | None = None) -> list[RequestSpec]:
    """Requests of a Mooncake or Bailian .jsonl or a .csv file with arrival times. date: only rows with this Date."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"trace_request_generator.trace_file is {name!r}: there is no such file")
    if format_of(path) != ".jsonl":
        return read_timed_csv(path, date)
    if date is not None:
        raise ValueError(f"trace_request_generator.date is {date!r}: it must be none for {name!r}, which has no dates")
    return read_json_lines(path)
