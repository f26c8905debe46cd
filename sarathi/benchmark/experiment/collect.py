"""Finished runs, read back from their folders; what a run was is in its saved configuration. Knows no folder's name."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.outcome import COMPLETED
from sarathi.benchmark.results import CONFIG_FILE, read_config
from sarathi.metrics.report import SUMMARY_FILE


@dataclass(frozen=True)
class FinishedRun:
    """One run's configuration and summary; its CSV files are read when asked for."""

    folder: Path
    config: BenchmarkConfig
    summary: Mapping[str, Any]

    def table(self, name: str) -> list[dict[str, float | None]]:
        """Rows of <name>.csv, numbers as such, empty cells as None; only the ids of steps of one engine are numbers."""
        with open(self.folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            return [
                {key: _number(cell) for key, cell in row.items() if not key.endswith(" Id") or cell.isdecimal()}
                for row in csv.DictReader(file)
            ]

    def quantile(self, metric: str, key: str) -> float | None:
        """One number of the summary, as quantile("request_e2e_time_normalized", "p50")."""
        value: float | None = self.summary["metrics"].get(metric, {}).get(key)
        return value


def collect(folder: Path) -> tuple[list[FinishedRun], list[Path]]:
    """Complete runs below `folder`, by folder, and the folders of runs that did not end well or measured nothing."""
    found, broken = [], []
    for place in sorted({path.parent for name in (SUMMARY_FILE, CONFIG_FILE) for path in folder.rglob(name)}):
        run = _read(place)
        if run is None:
            broken.append(place)
        else:
            found.append(run)
    return found, broken


def _read(place: Path) -> FinishedRun | None:
    try:
        summary = json.loads((place / SUMMARY_FILE).read_text(encoding="utf-8"))
        config = read_config(place)
        complete = summary["ended"] == COMPLETED and not summary["refused"] and "metrics" in summary
    except (LookupError, OSError, TypeError, ValueError):
        return None
    return FinishedRun(place, config, summary) if complete else None


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
