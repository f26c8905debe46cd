"""Latency targets (SLOs): quantiles of a run's latencies with limits in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sarathi.benchmark.config.schema import CapacitySearchConfig
from sarathi.config.knobs import ConfigError
from sarathi.metrics import RunRecords
from sarathi.metrics.request_record import RequestRecord

Latencies = Callable[[RequestRecord], list[float | None]]
METRICS: Mapping[str, Latencies] = {
    "scheduling_delay": lambda record: [record.request_scheduling_delay],
    "tbt": lambda record: [*record.token_gaps_s],
    "ttft": lambda record: [record.prefill_e2e_time],
    "e2e": lambda record: [record.request_e2e_time],
}


@dataclass(frozen=True)
class Slo:
    """The `quantile` (0 to 1) of a metric must be at most limit_s seconds. metric: one of METRICS."""

    metric: str
    quantile: float
    limit_s: float

    @property
    def name(self) -> str:
        return f"p{100 * self.quantile:g}_{self.metric}_s"

    def measure(self, records: RunRecords) -> float:
        """The quantile in seconds over all requests; infinite without samples."""
        latencies = METRICS[self.metric]
        values = [value for record in records.requests for value in latencies(record) if value is not None]
        return float(np.quantile(values, self.quantile)) if values else float("inf")


def slos_of(config: CapacitySearchConfig) -> list[Slo]:
    """The configured targets. ConfigError if there is none."""
    found = [slo for slo in measures_of(config) if slo.limit_s < math.inf]
    if not found:
        names = ", ".join(f"{metric}_slo_value" for metric in METRICS)
        raise ConfigError(f"capacity_search sets none of {names}: a search needs a target")
    return found


def measures_of(config: CapacitySearchConfig) -> list[Slo]:
    """Every metric at its quantile; metrics without a target have an infinite limit."""
    limits = {metric: getattr(config, f"{metric}_slo_value") for metric in METRICS}
    return [
        Slo(metric, getattr(config, f"{metric}_slo_quantile"), math.inf if limit_s is None else limit_s)
        for metric, limit_s in limits.items()
    ]


def meets_all(config: CapacitySearchConfig, values_s: Mapping[str, float]) -> bool:
    """Whether every target is met. values_s: name -> measured seconds."""
    return all(values_s[slo.name] <= slo.limit_s for slo in slos_of(config))
