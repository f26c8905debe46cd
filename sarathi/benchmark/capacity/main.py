"""python -m sarathi.benchmark.capacity.main [--config FILE] [--knob value ...]: capacity search with table and plot.

Takes the knobs of a run; section capacity_search configures the search. One engine serves all probes. --config-path
runs a grid of searches in Sarathi-Serve's YAML (grid.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sarathi.benchmark.capacity.grid import CONFIG_PATH, Job, read_jobs, translate
from sarathi.benchmark.capacity.report import completed_at, describe, found_in_words, write_capacity
from sarathi.benchmark.capacity.search import Probe, ProbeLog, SearchLimits, given_rates, measure_all, search
from sarathi.benchmark.capacity.slos import measures_of, meets_all, slos_of
from sarathi.benchmark.config.document import print_help
from sarathi.benchmark.config.options import as_words, parse_options, read_settings, start_logging
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.replicas.run import replica_devices
from sarathi.benchmark.run.outcome import COMPLETED, INTERRUPTED
from sarathi.benchmark.run.processes import ended_by_signals
from sarathi.benchmark.run.runner import BenchmarkRunner
from sarathi.benchmark.workload import RequestSpec
from sarathi.config.knobs import ConfigError
from sarathi.config.load import to_dict
from sarathi.metrics import RunRecords
from sarathi.metrics.files import write_table
from sarathi.metrics.tables import Table

RATED = ("poisson", "gamma")
EXIT_INTERRUPTED = 130
GRID_COLUMNS = ("models", "traces", "schedulers", "parallel_spec", "asked_qps", "capacity_qps", "found")
HELP = """Search the highest request rate at which an engine in this process meets latency targets.

The probes, a table and a plot are written to output_dir.

usage: sarathi bench capacity [--config FILE] [--knob VALUE ...]

    sarathi bench capacity --interval_provider poisson --tbt-slo-value 0.3 --max_model_len 2048 \\
        --trace_request_length_generator.max_tokens 2048
    sarathi bench capacity --config-path mistral7b_strict.yml --tbt-slo-value 0.1 --output-dir capacity
    sarathi bench capacity --config-path yi34b.yml --qps-values 0.55 0.7 0.85 1.0 --output-dir rates

--help-knobs lists every knob with its default; sarathi/benchmark/README.md explains them.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Search, write and print. Exit code: 0 a rate was found, 1 error or no rate found, 130 on ^C."""
    words = sys.argv[1:] if words is None else words
    if print_help(words, HELP):
        return 0
    try:
        settings = read_settings(words, switches=("debug",), lists=("qps_values",))
        path = settings.pop(CONFIG_PATH, settings.pop(CONFIG_PATH.replace("_", "-"), None))
        if path is not None:
            return search_grid(read_jobs(Path(path)), translate(settings))
        config = parse_options(as_words(settings))
        start_logging(config)
        found = search_one(config)
    except (ValueError, OSError) as error:
        print(f"capacity search: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0 if found["capacity_qps"] is not None else 1


def search_one(config: BenchmarkConfig) -> dict[str, object]:
    """Search, write and print; returns the last three columns of GRID_COLUMNS. ^C leaves a partial table.

    asked_qps: the highest rate that met the targets. capacity_qps: the completion rate at it.
    """
    log = open_log(config)
    try:
        with ended_by_signals():
            probes, asked_qps = find_capacity(config, log)
    except KeyboardInterrupt:
        write_capacity(config, log.probes())
        raise
    write_capacity(config, probes)
    print(describe(config, probes, asked_qps), flush=True)
    capacity_qps = None if asked_qps is None else completed_at(probes, asked_qps)
    found = found_in_words(config, probes, asked_qps)
    return {"asked_qps": asked_qps, "capacity_qps": capacity_qps, "found": found}


def search_grid(jobs: Sequence[Job], settings: Mapping[str, str]) -> int:
    """Run each job in its own folder, and write capacity_grid.csv. Returns 1 if a job failed or found no rate."""
    given = [word for name, value in settings.items() for word in (f"--{name}", value)]
    folder = Path(parse_options(given).output_dir)
    lines: list[dict[str, object]] = []
    for job in jobs:
        words = [*as_words(job.settings), *given, "--output_dir", str(folder / job.name)]
        config = parse_options(words)
        start_logging(config)
        print(f"# {job.name}", flush=True)
        lines.append({**job.labels, **_searched(config)})
        write_table(folder / "capacity_grid.csv", Table(GRID_COLUMNS, lines))
    return int(any(line["capacity_qps"] is None for line in lines))


def _searched(config: BenchmarkConfig) -> dict[str, object]:
    """Columns of one search. An error is printed and does not stop the other searches."""
    try:
        return search_one(config)
    except (ValueError, OSError) as error:
        print(f"capacity search: {error}", file=sys.stderr)
        return {"asked_qps": None, "capacity_qps": None, "found": f"failed: {error}"}


def open_log(config: BenchmarkConfig) -> ProbeLog:
    """The probe log in output_dir. ConfigError if this configuration cannot be searched."""
    slos_of(config.capacity_search), given_rates(config.capacity_search.qps_values)
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
    """Probes in order of rate, and the highest rate that met the targets."""
    knobs = config.capacity_search
    rates = given_rates(knobs.qps_values)
    with BenchmarkRunner(config, device=replica_devices(config).get("0"), stop=log.stop) as runner:

        def measure(qps: float) -> Probe:
            return _measure(runner, config, qps)

        if rates:
            return measure_all(measure, log, rates)
        return search(measure, log, SearchLimits(knobs.start_qps, knobs.tolerance, knobs.max_probes))


def _files_of_a_run(config: BenchmarkConfig) -> dict[str, object]:
    """Knobs that are set but only supported by a run."""
    return {
        "enable_profiling": config.enable_profiling,
        "write_json_trace": config.write_json_trace,
        "timestamped_output": config.timestamped_output,
        "metrics_store.enable_request_outputs": config.metrics_store.enable_request_outputs,
        "metrics_store.wandb_project": config.metrics_store.wandb_project,
    }


def _at_rate(config: BenchmarkConfig, qps: float) -> BenchmarkConfig:
    return replace(
        config,
        poisson_request_interval_generator=replace(config.poisson_request_interval_generator, qps=qps),
        gamma_request_interval_generator=replace(config.gamma_request_interval_generator, qps=qps),
    )


def _measure(runner: BenchmarkRunner, config: BenchmarkConfig, qps: float) -> Probe:
    """Run one probe. A probe that hits the time limit, or completes requests more slowly than they arrive, fails.

    The completion rate matters because a short run can have good latencies at any rate: one batch holds all requests.
    """
    specs = runner.workload(_at_rate(config, qps))
    outcome = runner.run(specs)
    if outcome.ended == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.refused:
        raise ConfigError(f"{len(outcome.refused)} requests are refused: {next(iter(outcome.refused.values()))}")
    records = outcome.records or RunRecords(0.0, 0.0)
    knobs = config.capacity_search
    values_s = {slo.name: slo.measure(records) for slo in measures_of(knobs)}
    completed_qps = outcome.num_finished / outcome.duration_s
    keeps_up = completed_qps >= knobs.completed_share * arrival_rate(specs)
    meets = outcome.ended == COMPLETED and keeps_up and meets_all(knobs, values_s)
    return Probe(qps, completed_qps, values_s, meets, outcome.num_finished)


def arrival_rate(specs: Sequence[RequestSpec]) -> float:
    """Requests per second between the first and the last arrival; infinite if all arrive at once."""
    times = [spec.arrived_at_s for spec in specs]
    return (len(times) - 1) / (max(times) - min(times)) if len(times) > 1 and max(times) > min(times) else math.inf


def key_of(config: BenchmarkConfig) -> str:
    """The settings that a probe's result depends on: all but output folder, log level and search limits."""
    settings = to_dict(config)
    settings["timed_operations"] = config.metrics_store.enable_op_level_metrics  # without graphs, one step at a time
    for name in ("output_dir", "log_level", "show_progress", "metrics_store", "profiling"):
        del settings[name]
    for name in ("qps_values", "start_qps", "tolerance", "max_probes"):
        del settings["capacity_search"][name]
    for name in ("poisson_request_interval_generator", "gamma_request_interval_generator"):
        del settings[name]["qps"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
