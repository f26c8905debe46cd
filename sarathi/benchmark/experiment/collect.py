"""Read finished runs from their folders. The saved configuration identifies a run, not its folder's name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.results import CONFIG_FILE, read_config
from sarathi.benchmark.run.outcome import COMPLETED
from sarathi.metrics.report import SUMMARY_FILE, TABLES_FOLDER


@dataclass(frozen=True)
class FinishedRun:
    """A run's configuration and summary; CSV files are read lazily."""

    folder: Path
    config: BenchmarkConfig
    summary: Mapping[str, Any]

    def table(self, name: str) -> pd.DataFrame:
        """<name>.csv, with empty cells as NaN."""
        return pd.read_csv(self.folder / TABLES_FOLDER / f"{name}.csv")

    def quantile(self, metric: str, key: str) -> float | None:
        """One number of the summary, e.g. quantile("request_e2e_time_normalized", "p50")."""
        value: float | None = self.summary["metrics"].get(metric, {}).get(key)
        return value

    def quantiles(self, prefix: str, metric: str, *keys: str) -> dict[str, float | None]:
        """Several quantiles of one metric; keys are prefixed."""
        return {prefix + key: self.quantile(metric, key) for key in keys}


def collect(folder: Path) -> tuple[list[FinishedRun], list[Path]]:
    """Complete runs below `folder`, sorted by folder, and the folders of failed or empty runs."""
    found_in = {path.parent for name in (SUMMARY_FILE, CONFIG_FILE) for path in folder.rglob(name)}
    places = sorted(place for place in found_in if place.name != TABLES_FOLDER)
    found = {place: _read(place) for place in places}
    return [run for run in found.values() if run is not None], [place for place in places if found[place] is None]


def _read(place: Path) -> FinishedRun | None:
    try:
        summary = json.loads((place / SUMMARY_FILE).read_text(encoding="utf-8"))
        run = FinishedRun(place, read_config(place), summary)
        complete = summary["ended"] == COMPLETED and not summary["refused"] and "metrics" in summary
    except (LookupError, OSError, TypeError, ValueError):
        return None
    return run if complete else None
