"""Rows of a result file, written as they come, and the time left for more. Knows nothing of what is measured."""

import csv
import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from sarathi.metrics.environment import environment

T = TypeVar("T")
Work = Iterable[tuple[str, Callable[[], None]]]
NEITHER_BETTER = ("MHz", "W")  # units of what is told of two runs and not compared


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

    def beside(self, other: "Row") -> "Row":
        """The row with the other as its reference."""
        ratio = self.value / other.value if is_rate(self.unit) else other.value / self.value
        return replace(self, reference=other.backend, ratio=ratio)


def is_rate(unit: str) -> bool:
    """Whether more is better: a count or a rate, and not a time."""
    return unit.endswith("/s") or unit in ("tokens", "requests")


class Attempts:
    """Measurements that may fail: one that does costs none of the others, and is named again at the end."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._under_way: list[str] = []  # one within the other

    def run(self, name: str, measure: Callable[[], T]) -> T | None:
        """What ``measure`` returns, or None with its error printed."""
        self._under_way.append(name)
        try:
            return measure()
        except Exception:
            self.failed.append(": ".join(self._under_way))
            print(f"# {self.failed[-1]} failed:\n{traceback.format_exc(limit=-4)}", flush=True)
            return None
        finally:
            self._under_way.pop()

    def exit_code(self) -> int:
        """1 where any failed, which are named."""
        if self.failed:
            print(f"# {len(self.failed)} failed: {', '.join(self.failed)}", flush=True)
        return int(bool(self.failed))


class Table:
    """A CSV file that holds every row as soon as it is known, and beside it what it was made with.

    Rows are added to those of earlier runs into the same folder; NAME.environment.json has an entry for each run.
    """

    def __init__(self, path: Path, attempts: Attempts | None = None, **facts: object) -> None:
        """attempts: of parts of its measurements; None: its own. facts: what the environment lacks, as JSON values."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.attempts = attempts or Attempts()
        self.rows: list[Row] = list(read_rows(path)) if path.exists() else []
        self._rewrite()
        _note_run(path.with_suffix(".environment.json"), facts)

    def add(self, row: Row) -> None:
        """Writes and prints the row."""
        self.rows.append(row)
        self._write([_cells(row)], "a")
        against = f"  {row.ratio:.3f}x {row.reference}" if row.ratio is not None else ""
        shape = f"{row.batch:>4} x {row.context:<7}"
        what = f"{row.model:12} {row.work:16} {shape} {row.backend:44}"
        print(f"{what} {row.value:>9.6g} {row.unit}{against}", flush=True)

    def compare(self, row: Row, reference: Row) -> None:
        """Puts a reference that was measured later beside a row."""
        compared = row.beside(reference)
        self.rows[self.rows.index(row)] = compared
        self._rewrite()
        print(f"    {row.work} {row.batch} x {row.context}: {compared.ratio:.3f}x {reference.backend}", flush=True)

    def add_compared(self, rows: list[Row], reference: str) -> None:
        """Adds rows of one shape, times all, each beside the best of those whose backend contains `reference`."""
        others = [row for row in rows if reference in row.backend]
        best = min(others, key=lambda row: row.value, default=None)
        for row in rows:
            self.add(row if best is None or row in others else row.beside(best))

    def _rewrite(self) -> None:
        self._write([[field.name for field in fields(Row)], *map(_cells, self.rows)], "w")

    def _write(self, lines: list[list[object]], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


def _cells(row: Row) -> list[object]:
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    return [*astuple(row)[:5], f"{row.value:.6g}", row.unit, row.reference, ratio]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that a Table wrote; columns that it lacks are empty."""
    with path.open(newline="") as file:
        for each in csv.DictReader(file):
            shape = (each["model"], each["work"], each["backend"], int(each["batch"]), int(each["context"]))
            ratio = each.get("ratio") or None
            found = None if ratio is None else float(ratio)
            yield Row(*shape, float(each["value"]), each["unit"], each.get("reference") or "", found)


class Budget:
    """Seconds left for measuring. Work is a list of thunks, most important first; what does not fit is named."""

    def __init__(self, seconds: float, attempts: Attempts) -> None:
        self._attempts = attempts
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def run(self, work: Work) -> None:
        """Runs each while time is left; one that fails is reported and passed over."""
        skipped = []
        for name, measure in work:
            if self.left_s <= 0:
                skipped.append(name)
                continue
            print(f"# {name} ({self.left_s:.0f} s left)", flush=True)
            self._attempts.run(name, measure)
        if skipped:
            print(f"# out of time for: {', '.join(skipped)}", flush=True)


def _note_run(path: Path, facts: dict[str, object]) -> None:
    runs = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*runs, {**environment(), **facts}], indent=2) + "\n")
