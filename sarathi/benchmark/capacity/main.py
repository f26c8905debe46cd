"""python -m sarathi.benchmark.capacity.main [--config FILE] [--knob value ...]: a search, a table and a plot.

Takes the knobs of a run; section capacity_search says what is looked for. One engine serves all probes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from sarathi.benchmark.capacity.search import Probe, ProbeLog, SearchLimits, is_settled, search
from sarathi.benchmark.config.document import default_yaml
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.outcome import COMPLETED, INTERRUPTED
from sarathi.benchmark.processes import ended_by_signals
from sarathi.benchmark.replicas import replica_devices
from sarathi.benchmark.runner import BenchmarkRunner
from sarathi.config.knobs import ConfigError
from sarathi.config.load import to_dict
from sarathi.metrics import RunRecords
from sarathi.metrics.files import write_table
from sarathi.metrics.plots import is_available, plot_lines
from sarathi.metrics.tables import Table

COLUMNS = ("qps", "value_s", "meets", "num_completed")
RATED = ("poisson", "gamma")
EXIT_INTERRUPTED = 130
USAGE = "python -m sarathi.benchmark.capacity.main [--config FILE] [--knob value ...]\n\nKnobs and defaults:\n"


def main(words: Sequence[str] | None = None) -> int:
    """Search, write, print; the exit code: 0 a rate was found, 1 an error or none was, 130 on ^C."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        print(USAGE + default_yaml())
        return 0
    try:
        config = parse_options(words)
        logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        log = open_log(config)
        try:
            with ended_by_signals():
                probes, capacity_qps = find_capacity(config, log)
        except KeyboardInterrupt:
            write_capacity(config, log.probes())
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return EXIT_INTERRUPTED
        write_capacity(config, probes)
    except (ValueError, OSError) as error:
        print(f"capacity search: {error}", file=sys.stderr)
        return 1
    print(describe(config, probes, capacity_qps))
    return 0 if capacity_qps is not None else 1


def open_log(config: BenchmarkConfig) -> ProbeLog:
    """The probes in output_dir. ConfigError where nothing can be searched with this configuration."""
    provider = config.synthetic_request_generator.interval_provider
    if provider not in RATED or config.request_generator.provider != "synthetic":
        raise ConfigError(
            f"interval_provider is {provider!r}: a search needs one that has a rate, {' or '.join(RATED)}"
        )
    if config.cluster.num_replicas != 1 or not config.write_metrics:
        raise ConfigError("a search needs cluster.num_replicas 1 and write_metrics true")
    if asked := [name for name, value in _files_of_a_run(config).items() if value]:
        raise ConfigError(f"{', '.join(asked)}: a search writes its probes alone, run the rate that it finds by itself")
    return ProbeLog(Path(config.output_dir) / "probes.jsonl", key_of(config))


def find_capacity(config: BenchmarkConfig, log: ProbeLog) -> tuple[list[Probe], float | None]:
    """Probes in order of rate, and the capacity in requests a second."""
    knobs = config.capacity_search
    with BenchmarkRunner(config, device=replica_devices(config).get("0")) as runner:
        limits = SearchLimits(knobs.start_qps, knobs.tolerance, knobs.max_probes)
        return search(lambda qps: _measure(runner, config, qps), log, limits)


def write_capacity(config: BenchmarkConfig, probes: Sequence[Probe]) -> None:
    """capacity.csv and capacity.png in output_dir; nothing where there is no probe."""
    folder = Path(config.output_dir)
    if not probes:
        return
    write_table(folder / "capacity.csv", Table(COLUMNS, [asdict(probe) for probe in probes]))
    rates = [probe.qps for probe in probes]
    measured = (rates, [probe.value_s for probe in probes])
    target = (rates, [config.capacity_search.target_s] * len(rates))
    lines = {_measured_name(config): measured, "target": target}
    if not is_available():
        return
    plot_lines(folder / "capacity.png", lines, "requests a second", "seconds", marker="o")


def describe(config: BenchmarkConfig, probes: Sequence[Probe], capacity_qps: float | None) -> str:
    """The table of probes, and the answer."""
    lines = [f"{'qps':>9} {_measured_name(config) + ', s':>12}  meets"]
    lines += [f"{probe.qps:9.3f} {probe.value_s:12.4f}  {'yes' if probe.meets else 'no'}" for probe in probes]
    return "\n".join([*lines, f"target {config.capacity_search.target_s} s: {_found(config, probes, capacity_qps)}"])


def _found(config: BenchmarkConfig, probes: Sequence[Probe], capacity_qps: float | None) -> str:
    """The capacity in words, and how far it is known where max_probes ended the search."""
    if capacity_qps is None:
        return "no rate met it"
    bad_qps = min((probe.qps for probe in probes if not probe.meets), default=None)
    if bad_qps is None:
        return f"capacity at least {capacity_qps:.3f} requests a second; no rate that was tried missed it"
    if not is_settled(capacity_qps, bad_qps, config.capacity_search.tolerance):
        return f"capacity from {capacity_qps:.3f} to {bad_qps:.3f} requests a second; max_probes ended the search"
    return f"capacity {capacity_qps:.3f} requests a second"


def _files_of_a_run(config: BenchmarkConfig) -> dict[str, object]:
    """Knobs that ask for what only a run writes or sends."""
    return {
        "enable_profiling": config.enable_profiling,
        "write_json_trace": config.write_json_trace,
        "metrics_store.enable_request_outputs": config.metrics_store.enable_request_outputs,
        "metrics_store.wandb_project": config.metrics_store.wandb_project,
    }


def _measured_name(config: BenchmarkConfig) -> str:
    return f"P{100 * config.capacity_search.quantile:g} {config.capacity_search.metric}"


def _measure(runner: BenchmarkRunner, config: BenchmarkConfig, qps: float) -> Probe:
    """A probe that did not end in time did not meet the target, whatever its first requests showed."""
    at_rate = replace(
        config,
        poisson_request_interval_generator=replace(config.poisson_request_interval_generator, qps=qps),
        gamma_request_interval_generator=replace(config.gamma_request_interval_generator, qps=qps),
    )
    outcome = runner.run(runner.workload(at_rate))
    if outcome.ended == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.refused:
        raise ConfigError(f"{len(outcome.refused)} requests are refused: {next(iter(outcome.refused.values()))}")
    values = latencies_s(outcome.records or RunRecords(0.0, 0.0), config.capacity_search.metric)
    value_s = float(np.quantile(values, config.capacity_search.quantile)) if values else float("inf")
    meets = outcome.ended == COMPLETED and value_s <= config.capacity_search.target_s
    return Probe(qps, value_s, meets, outcome.num_finished)


def latencies_s(records: RunRecords, metric: str) -> list[float]:
    """All values of "tbt" or "ttft"."""
    if metric == "tbt":
        return [gap for record in records.requests for gap in record.token_gaps_s]
    return [time for record in records.requests if (time := record.prefill_e2e_time) is not None]


def key_of(config: BenchmarkConfig) -> str:
    """What decides a probe's value: everything but where it is written, how much is said, and how long is searched."""
    settings = to_dict(config)
    settings["timed_operations"] = config.metrics_store.enable_op_level_metrics  # without graphs, one step at a time
    for name in ("output_dir", "log_level", "show_progress", "metrics_store", "profiling"):
        del settings[name]
    for name in ("start_qps", "tolerance", "max_probes"):
        del settings["capacity_search"][name]
    for name in ("poisson_request_interval_generator", "gamma_request_interval_generator"):
        del settings[name]["qps"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
