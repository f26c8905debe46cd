"""The runs of an experiment, each in a process of its own: a crash of one ends no other. Knows no tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sarathi.benchmark.config.options import as_words, parse_options
from sarathi.benchmark.experiment.plan import Run
from sarathi.benchmark.outcome import COMPLETED
from sarathi.benchmark.results import CONFIG_FILE, read_config
from sarathi.metrics.report import SUMMARY_FILE

LOG_FILE = "log.txt"
TAIL_LINES = 6


@dataclass(frozen=True)
class Failure:
    """A run that gave no complete result, and the end of what it said."""

    name: str
    exit_code: int
    tail: str


def execute(runs: Sequence[Run], folder: Path, resume: bool) -> list[Failure]:
    """Run all; what failed. resume: leave out those whose folder holds a complete result of the same configuration."""
    failures = []
    for number, run in enumerate(runs, 1):
        place = folder / run.name
        settings = {**run.settings, "output_dir": str(place)}
        if resume and is_complete(place, settings):
            print(f"[{number}/{len(runs)}] {run.name}: done before", flush=True)
            continue
        print(f"[{number}/{len(runs)}] {run.name}", flush=True)
        code = _run(place, settings)
        if code != 0:
            failures.append(Failure(run.name, code, _tail(place / LOG_FILE)))
            print(f"  failed, exit code {code}: {place / LOG_FILE}", flush=True)
    return failures


def is_complete(place: Path, settings: Mapping[str, object]) -> bool:
    """Whether `place` holds a result of exactly these settings that ran to its end."""
    try:
        summary = json.loads((place / SUMMARY_FILE).read_text(encoding="utf-8"))
        same = read_config(place) == parse_options(as_words(settings))
    except (OSError, ValueError):
        return False
    return same and summary.get("ended") == COMPLETED and not summary.get("refused")


def _run(place: Path, settings: Mapping[str, object]) -> int:
    """The exit code of one run; what it says goes to its log. An older result is removed: it must not pass for new."""
    place.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY_FILE, CONFIG_FILE):
        (place / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "sarathi.benchmark.main", *as_words(settings)]
    with open(place / LOG_FILE, "w", encoding="utf-8") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])
