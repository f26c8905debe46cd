"""Rows of a result file, written as they come, and the time left for more. Knows nothing of what is measured."""

import csv
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement; ratio > 1 means that ours is better than the reference."""

    model: str
    work: str
    backend: str
    batch: int
    context: int
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None


def attempt(name: str, measure: Callable[[], float]) -> float | None:
    """What ``measure`` returns, or None with its error printed: one kernel that fails does not cost the others."""
    try:
        return measure()
    except Exception as problem:
        print(f"    {name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        return None


class Table:
    """A CSV file that holds every row as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow([field.name for field in fields(Row)])
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Writes and prints the row."""
        self.rows.append(row)
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        value = f"{row.value:.6g}"
        self._writer.writerow([*astuple(row)[:5], value, row.unit, row.reference, ratio])
        self._file.flush()
        against = f"  {ratio}x {row.reference}" if row.ratio is not None else ""
        shape = f"{row.batch:>4} x {row.context:<7}"
        print(f"{row.model:12} {row.work:16} {shape} {row.backend:44} {value:>9} {row.unit}{against}", flush=True)

    def add_compared(self, rows: list[Row], reference: str) -> None:
        """Adds rows of one shape, times all, each beside the best of those whose backend contains `reference`."""
        others = [row for row in rows if reference in row.backend]
        best = min(others, key=lambda row: row.value, default=None)
        for row in rows:
            if best is None or row in others:
                self.add(row)
            else:
                self.add(Row(*astuple(row)[:7], best.backend, best.value / row.value))


class Budget:
    """Seconds left for measuring. Work is a list of thunks, most important first; what does not fit is named."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def run(self, work: Iterable[tuple[str, Callable[[], None]]]) -> None:
        """Runs each while time is left; one that fails is reported and passed over."""
        skipped = []
        for name, measure in work:
            if self.left_s <= 0:
                skipped.append(name)
                continue
            print(f"# {name} ({self.left_s:.0f} s left)", flush=True)
            try:
                measure()
            except Exception:
                print(f"# {name} failed:\n{traceback.format_exc(limit=-4)}", flush=True)
        if skipped:
            print(f"# out of time for: {', '.join(skipped)}", flush=True)
