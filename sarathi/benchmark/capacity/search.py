"""Bracketing and bisection over request rates. A probe is a function; its result is kept in a file.

rate   1 ok   2 ok   4 ok   8 too much   6 ok   7 too much   6.5 ok ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sarathi.config.knobs import ConfigError


@dataclass(frozen=True)
class Probe:
    """One rate that was tried. values_s: name of each latency target -> what was measured.

    completed_qps: requests completed a second, from the first arrival to the last token. meets: whether every latency
    target is met and the engine kept up with the rate.
    """

    qps: float
    completed_qps: float
    values_s: Mapping[str, float]
    meets: bool
    num_completed: int


@dataclass(frozen=True)
class SearchLimits:
    """Rates start at start_qps; the search ends when the bounds differ by `tolerance`, or after max_probes."""

    start_qps: float
    tolerance: float
    max_probes: int


class ProbeLog:
    """Probes on disk, one JSON line each, so that a search goes on where it was interrupted.

    key: what the probes were measured with; a file of another key is refused with a ValueError, not mixed in.
    A last line that was not written to its end is dropped.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._known = self._read()

    def find(self, qps: float) -> Probe | None:
        return self._known.get(qps)

    def probes(self) -> list[Probe]:
        """All of them in order of rate."""
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
            self._path.write_text(whole, encoding="utf-8")
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            keys = {line.pop("key") for line in lines}
            probes = [_probe(line) for line in lines]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path} is no file of probes ({error}); remove it") from None
        if keys - {self._key}:
            raise ValueError(
                f"{self._path} holds probes of another configuration; name another output_dir, or remove it"
            )
        return {probe.qps: probe for probe in probes}


def _probe(line: Mapping[str, Any]) -> Probe:
    return Probe(line["qps"], line["completed_qps"], dict(line["values_s"]), line["meets"], line["num_completed"])


def search(measure: Callable[[float], Probe], log: ProbeLog, limits: SearchLimits) -> tuple[list[Probe], float | None]:
    """All probes in order of rate, and the highest rate that met the target; None where none did.

    The rate is doubled while it meets the target, or halved while it does not; then the gap is bisected.
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
    """Probes of these rates, in order, and the highest that met the target; None where none did."""
    probes = [_known_or_measured(measure, log, qps) for qps in sorted(rates)]
    return probes, max((probe.qps for probe in probes if probe.meets), default=None)


def given_rates(text: str | None) -> list[float]:
    """Rates of a knob such as 0.5,1,2; none of None. ConfigError where one is no rate."""
    try:
        rates = [float(part) for part in (text or "").split(",") if text]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"capacity_search.qps_values is {text!r}: it must be rates above 0, as 0.5,1,2")
    return rates


def _known_or_measured(measure: Callable[[float], Probe], log: ProbeLog, qps: float) -> Probe:
    probe = log.find(qps)
    if probe is None:
        probe = measure(qps)
        log.add(probe)
    return probe


def is_settled(good: float, bad: float, tolerance: float) -> bool:
    """Whether a rate that met the target and one that did not are as near as `tolerance` asks."""
    return good > 0 and bad - good <= tolerance * good


def _next(good: float, bad: float) -> float:
    if good == 0:
        return bad / 2
    return good * 2 if bad == float("inf") else (good + bad) / 2
