"""Which sections a run reads: a provider selects its own section, and the others have no effect."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from sarathi.benchmark.config.schema import BenchmarkConfig

_REQUESTS = "request_generator.provider"
_LENGTHS = "synthetic_request_generator.length_provider"
_INTERVALS = "synthetic_request_generator.interval_provider"
_POLICY = "replica_scheduler.provider"
# Section -> the knob that selects it, and the selecting values; messages suggest the first one.
SELECTORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "trace_request_generator": (_REQUESTS, ("trace",)),
    "synthetic_request_generator": (_REQUESTS, ("synthetic",)),
    "fixed_request_length_generator": (_LENGTHS, ("fixed",)),
    "uniform_request_length_generator": (_LENGTHS, ("uniform",)),
    "zipf_request_length_generator": (_LENGTHS, ("zipf",)),
    "trace_request_length_generator": (_LENGTHS, ("trace",)),
    "prefix_repetition_request_length_generator": (_LENGTHS, ("prefix_repetition",)),
    "multi_turn_request_length_generator": (_LENGTHS, ("multi_turn",)),
    "poisson_request_interval_generator": (_INTERVALS, ("poisson",)),
    "gamma_request_interval_generator": (_INTERVALS, ("gamma",)),
    "trace_request_interval_generator": (_INTERVALS, ("trace",)),
    "sarathi_scheduler": (_POLICY, ("sarathi",)),
    "simple_chunking_scheduler": (_POLICY, ("simple_chunking",)),
    "vllm_scheduler": (_POLICY, ("vllm", "orca", "faster_transformer")),
}
_ALWAYS_READ = ("synthetic_request_generator.num_requests",)  # it cuts a replay, too


def without_effect(config: BenchmarkConfig, paths: Iterable[str]) -> list[str]:
    """A warning for each of these knobs (full paths) that the run does not read: what to set instead."""
    found = ((path, _missing(config, path)) for path in paths if path not in _ALWAYS_READ)
    return [
        f"{path} has no effect: {knob} is {attrgetter(knob)(config)}, and only {' or '.join(values)} reads it"
        for path, missing in found
        for knob, values in ([missing] if missing else [])
    ]


def _missing(config: BenchmarkConfig, path: str) -> tuple[str, tuple[str, ...]] | None:
    """The knob that should select the section of `path` or one above it; None if it is selected."""
    selector = SELECTORS.get(path.partition(".")[0])
    if selector is None:
        return None
    above = _missing(config, selector[0])
    return above or (None if attrgetter(selector[0])(config) in selector[1] else selector)
