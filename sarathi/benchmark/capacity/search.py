"""Bracketing and bisection over request rates. Results of probes are kept in a file.

rate   1 ok   2 ok   4 ok   8 too much   6 ok   7 too much   6.5 ok ...
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sarathi.benchmark.run.processes import held_signals, stopped_by_signals
from sarathi.config.knobs import ConfigError
from sarathi.metrics.files import open_replacing


@dataclass(frozen=True)
class Probe:
    """The measurement at one rate. values_s: name of each latency target -> measured seconds.

    completed_qps: requests completed per second, from the first arrival to the last token. meets: whether every latency
    target is met and the engine kept up with the rate.
    """

    qps: float
    completed_qps: float
    values_s: Mapping[str, float]
    meets: bool
    num_completed: int


@dataclass(frozen=True)
class SearchLimits:
    """Start rate, and when to stop: when the bounds differ by `tolerance` (relative), or after max_probes."""

    start_qps: float
    tolerance: float
    max_probes: int


class ProbeLog:
    """Probes on disk as JSON lines: an interrupted search resumes from them.

    key: settings that the probes depend on; ValueError if the file has another key. An incomplete last line is dropped.
    stop: set by a signal that arrives while a probe is measured or written.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.stop = threading.Event()
        self._path, self._key = path, key
        self._known = self._read()

    def find(self, qps: float) -> Probe | None:
        return self._known.get(qps)

    def probes(self) -> list[Probe]:
        """All probes in order of rate."""
        return [self._known[qps] for qps in sorted(self._known)]

    def add(self, probe: Probe) -> None:
        self._known[probe.qps] = probe
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key, **asdict(probe)}) + "\n")

    def _read(self) -> dict[float, Probe]:
        if not self._path.exists():
            return {}
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            with open_replacing(self._path) as file:
                file.write(whole)
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            keys = {line.pop("key") for line in lines}
            probes = [_probe(line) for line in lines]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path} is not a probe file ({error}); remove it") from None
        if keys - {self._key}:
            raise ValueError(
                f"{self._path} holds probes of another configuration; name another output_dir, or remove it"
            )
        return {probe.qps: probe for probe in probes}


def _probe(line: Mapping[str, Any]) -> Probe:
    return Probe(line["qps"], line["completed_qps"], dict(line["values_s"]), line["meets"], line["num_completed"])


def search(measure: Callable[[float], Probe], log: ProbeLog, limits: SearchLimits) -> tuple[list[Probe], float | None]:
    """All probes in order of rate, and the highest rate that met the targets, or None.

    Doubles the rate until it fails, or halves it until it passes; then bisects.
    """
    tried: list[Probe] = []
    good, bad = 0.0, float("inf")
    qps = limits.start_qps
    while len(tried) < limits.max_probes and not is_settled(good, bad, limits.tolerance):
        probe = _known_or_measured(measure, log, qps)
        tried.append(probe)
        good, bad = (max(good, qps), bad) if probe.meets else (good, min(bad, qps))
        qps = _next(good, bad)
    return sorted(tried, key=lambda probe: probe.qps), good or None


def measure_all(
    measure: Callable[[float], Probe], log: ProbeLog, rates: Sequence[float]
) -> tuple[list[Probe], float | None]:
    """Probes at these rates, in order, and the highest rate that met the targets, or None."""
    probes = [_known_or_measured(measure, log, qps) for qps in sorted(rates)]
    return probes, max((probe.qps for probe in probes if probe.meets), default=None)


def given_rates(text: str | None) -> list[float]:
    """Parse rates such as 0.5,1,2; None has none. ConfigError if one is not a positive number."""
    try:
        rates = [float(part) for part in (text or "").split(",") if text]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"capacity_search.qps_values is {text!r}: it must be rates above 0, as 0.5,1,2")
    return rates


def _known_or_measured(measure: Callable[[float], Probe], log: ProbeLog, qps: float) -> Probe:
    """A signal raises KeyboardInterrupt after a probe that is measured has been written."""
    if (known := log.find(qps)) is not None:
        return known
    with stopped_by_signals(log.stop):
        probe = measure(qps)
        with held_signals(log.stop):
            log.add(probe)
    if log.stop.is_set():
        raise KeyboardInterrupt
    return probe


def is_settled(good: float, bad: float, tolerance: float) -> bool:
    """Whether the bounds are within `tolerance` of each other."""
    return good > 0 and bad - good <= tolerance * good


def _next(good: float, bad: float) -> float:
    if good == 0:
        return bad / 2
    return good * 2 if bad == float("inf") else (good + bad) / 2
