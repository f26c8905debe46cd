"""Run an experiment. Runs that can share an engine share a process, which isolates crashes from other runs.

A run's folder holds its configuration (config.yml) and, once complete, its result (summary.json).

    python -m sarathi.benchmark.experiment.execute FOLDER ...     # the runs of these folders, on one engine
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sarathi.benchmark.config.engine import without_workload
from sarathi.benchmark.config.options import as_words, parse_options
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.experiment.plan import Run
from sarathi.benchmark.results import read_config, write_config
from sarathi.benchmark.run.outcome import COMPLETED
from sarathi.benchmark.run.processes import locked
from sarathi.metrics.report import SUMMARY_FILE, remove_report
from sarathi.parent_death import end_with_parent

LOG_FILE = "log.txt"
TAIL_LINES = 6


@dataclass(frozen=True)
class Failure:
    """A run without a complete result, and the last lines of its log."""

    name: str
    exit_code: int
    tail: str


def execute(runs: Sequence[Run], folder: Path, resume: bool) -> list[Failure]:
    """Run all; returns the failures. resume: skip runs that have a complete result of the same configuration.

    Several processes may share an output folder. ValueError if another process is executing one of these runs.
    """
    configs = [parse_options(as_words({**run.settings, "output_dir": str(folder / run.name)})) for run in runs]
    with locked(_place(config) for config in configs):
        done = [config for config in configs if resume and is_complete(config)]
        for config in done:
            print(f"{_place(config).name}: done before", flush=True)
        failures: list[Failure] = []
        for group in groups([config for config in configs if config not in done]):
            failures += _run_group(group)
    return failures


def groups(configs: Sequence[BenchmarkConfig]) -> list[list[BenchmarkConfig]]:
    """Configurations grouped by engine, in order of each engine's first run."""
    found: dict[BenchmarkConfig, list[BenchmarkConfig]] = {}
    for config in configs:
        found.setdefault(without_workload(config), []).append(config)
    return list(found.values())


def is_complete(config: BenchmarkConfig) -> bool:
    """Whether the run's folder has a complete result of this configuration."""
    try:
        same = replace(read_config(_place(config)), output_dir=config.output_dir) == config
        summary = json.loads((_place(config) / SUMMARY_FILE).read_text(encoding="utf-8"))
        return same and summary.get("ended") == COMPLETED and not summary.get("refused")
    except (AttributeError, OSError, ValueError):
        return False


def _run_group(group: Sequence[BenchmarkConfig]) -> Iterator[Failure]:
    """Run a group; if a run kills the process, continue with the remaining runs in a new one."""
    left = list(group)
    while left:
        log = _place(left[0]) / LOG_FILE
        code = _run([_prepare(config) for config in left], log)
        reached = _reached(left)
        for config in left[:reached]:
            if not is_complete(config):
                print(f"  failed, exit code {code}: {log}", flush=True)
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                yield Failure(_place(config).name, code, "\n".join(lines[-TAIL_LINES:]))
        left = left[reached:]


def _prepare(config: BenchmarkConfig) -> Path:
    """Create a run's folder with its configuration. Removes an older summary first: it belongs to the old one."""
    place = _place(config)
    remove_report(place)
    write_config(config)
    print(place.name, flush=True)
    return place


def _reached(configs: Sequence[BenchmarkConfig]) -> int:
    """Number of runs that the process started: those with a summary, and the one that ended it."""
    return next((at for at, each in enumerate(configs, 1) if not (_place(each) / SUMMARY_FILE).is_file()), len(configs))


def _run(places: Sequence[Path], log: Path) -> int:
    """Run them in a process with its output in `log`; returns the exit code.

    After an interrupt, waits for the process to write partial results. It is killed if this process dies.
    """
    command = [sys.executable, "-m", "sarathi.benchmark.experiment.execute", *map(str, places)]
    attach = partial(end_with_parent, os.getpid())
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=attach) as process,
    ):
        try:
            return process.wait()
        except KeyboardInterrupt:  # ^C of a terminal has reached the process already; a second signal is harmless
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise


def _place(config: BenchmarkConfig) -> Path:
    return Path(config.output_dir)


if __name__ == "__main__":
    from sarathi.benchmark.main import run_configs  # imports torch, which the driver does not need

    sys.exit(run_configs(lambda: [read_config(Path(folder)) for folder in sys.argv[1:]]))
