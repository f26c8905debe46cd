"""What a search found: a table and a plot in files, and the answer in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sarathi.benchmark.capacity.search import Probe, is_settled
from sarathi.benchmark.capacity.slos import measures_of, meets_all, slos_of
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.metrics.environment import caption, environment
from sarathi.metrics.files import open_replacing
from sarathi.metrics.plots import is_available, plot_lines


def table_of(config: BenchmarkConfig, probes: Sequence[Probe]) -> pd.DataFrame:
    """A record for each probe: rate asked and completed, seconds of each quantile, and whether all targets are met."""
    names = [slo.name for slo in measures_of(config.capacity_search)]
    columns = ["qps", "completed_qps", *names, "meets", "num_completed"]
    return pd.DataFrame([{**vars(probe), **probe.values_s} for probe in probes], columns=columns)


def write_capacity(config: BenchmarkConfig, probes: Sequence[Probe]) -> None:
    """capacity.csv and capacity.png in output_dir; nothing where there is no probe."""
    if not probes:
        return
    folder, table = Path(config.output_dir), table_of(config, probes)
    with open_replacing(folder / "capacity.csv") as file:
        table.to_csv(file, index=False)
    if not is_available():
        return
    rates, slos = table["qps"].tolist(), slos_of(config.capacity_search)
    lines = {slo.name: (rates, (table[slo.name] / slo.limit_s).tolist()) for slo in slos}
    lines["target"] = (rates, [1.0] * len(rates))
    told = caption([environment()], [config.model.name, config.model.attention_backend])
    plot_lines(folder / "capacity.png", lines, "request rate (requests/s)", "share of the target", "o", told)


def describe(config: BenchmarkConfig, probes: Sequence[Probe], asked_qps: float | None) -> str:
    """The table of probes, and the answer."""
    table = table_of(config, probes).replace({"meets": {True: "yes", False: "no"}})
    targets = ", ".join(f"{slo.name} {slo.limit_s:g}" for slo in slos_of(config.capacity_search))
    lines = table.to_string(index=False, float_format="{:.4f}".format)
    return f"{lines}\ntargets {targets}: {found_in_words(config, probes, asked_qps)}{_not_kept_up(config, probes)}"


def _not_kept_up(config: BenchmarkConfig, probes: Sequence[Probe]) -> str:
    """A sentence about the lowest rate that was too much, if the engine met every latency there but did not keep up."""
    first = next((probe for probe in probes if not probe.meets), None)
    if first is None or not meets_all(config.capacity_search, first.values_s):
        return ""
    return (
        f"\nat {first.qps:.3f} requests a second latencies met the targets, but the engine completed "
        f"{first.completed_qps:.3f} a second; with a larger num_requests the last answers count less"
    )


def completed_at(probes: Sequence[Probe], qps: float) -> float:
    """Requests a second that the engine completed at a rate that was tried."""
    return next(probe.completed_qps for probe in probes if probe.qps == qps)


def found_in_words(config: BenchmarkConfig, probes: Sequence[Probe], asked_qps: float | None) -> str:
    """The rate completed at the highest one that met the targets, which is named, and how far the capacity is known."""
    if asked_qps is None:
        return "no rate met it"
    done = f"{completed_at(probes, asked_qps):.3f} requests a second, asked for {asked_qps:.3f}"
    bad_qps = min((probe.qps for probe in probes if not probe.meets), default=None)
    if bad_qps is None:
        return f"capacity at least {done}; no rate that was tried was too much"
    if not is_settled(asked_qps, bad_qps, config.capacity_search.tolerance):
        end = "no rate between was tried" if config.capacity_search.qps_values else "max_probes ended the search"
        return f"capacity at least {done}; {bad_qps:.3f} was too much, and {end}"
    return f"capacity {done}"
