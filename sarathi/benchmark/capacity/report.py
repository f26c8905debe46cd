"""Report of a capacity search: CSV table, plot and text."""

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
    """A record for each probe: requested and completed rate, quantiles in seconds, and whether all targets are met."""
    names = [slo.name for slo in measures_of(config.capacity_search)]
    columns = ["qps", "completed_qps", *names, "meets", "num_completed"]
    return pd.DataFrame([{**vars(probe), **probe.values_s} for probe in probes], columns=columns)


def write_capacity(config: BenchmarkConfig, probes: Sequence[Probe]) -> None:
    """Write capacity.csv and capacity.png into output_dir, if there is a probe."""
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
    title = caption([environment()], [config.model.name, config.model.attention_backend])
    plot_lines(folder / "capacity.png", lines, "request rate (requests/s)", "share of the target", "o", title)


def describe(config: BenchmarkConfig, probes: Sequence[Probe], asked_qps: float | None) -> str:
    """The table of probes and the result, as text."""
    table = table_of(config, probes).replace({"meets": {True: "yes", False: "no"}})
    targets = ", ".join(f"{slo.name} {slo.limit_s:g}" for slo in slos_of(config.capacity_search))
    lines = table.to_string(index=False, float_format="{:.4f}".format)
    return f"{lines}\ntargets {targets}: {found_in_words(config, probes, asked_qps)}{_not_kept_up(config, probes)}"


def _not_kept_up(config: BenchmarkConfig, probes: Sequence[Probe]) -> str:
    """A hint if the lowest failed rate met every latency target but requests completed more slowly than they came."""
    first = next((probe for probe in probes if not probe.meets), None)
    if first is None or not meets_all(config.capacity_search, first.values_s):
        return ""
    return (
        f"\nat {first.qps:.3f} requests a second latencies met the targets, but the engine completed "
        f"{first.completed_qps:.3f} a second; with a larger num_requests the last answers count less"
    )


def completed_at(probes: Sequence[Probe], qps: float) -> float:
    """The completion rate of the probe at `qps`, in requests per second."""
    return next(probe.completed_qps for probe in probes if probe.qps == qps)


def found_in_words(config: BenchmarkConfig, probes: Sequence[Probe], asked_qps: float | None) -> str:
    """The completion rate at the highest rate that met the targets, and the bounds of the capacity."""
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
