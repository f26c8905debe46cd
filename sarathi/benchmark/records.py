"""Records of measurements, written to a CSV file as they come, within a budget of time."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import pandas as pd

from sarathi.metrics.environment import environment

T = TypeVar("T")
Work = Iterable[tuple[str, Callable[[], object]]]  # name of a measurement, what measures it
NOT_COMPARED = ("MHz", "W")  # units of which neither more nor less is better
BOUND = "products and attention alone"  # the backend of records of roofline.py


@dataclass(frozen=True)
class Record:
    """One measurement. ratio: above 1 where it is better than that of the backend `reference`."""

    model: str
    work: str
    backend: str
    batch: int
    context: int
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None

    def beside(self, other: Record) -> Record:
        """The record with the other as its reference."""
        ratio = self.value / other.value if is_rate(self.unit) else other.value / self.value
        return replace(self, reference=other.backend, ratio=ratio)

    @property
    def task(self) -> tuple[object, ...]:
        """What was measured, apart from the backend."""
        return self.model, self.work, self.batch, self.context, self.unit


COLUMNS = [field.name for field in fields(Record)]


def is_rate(unit: str) -> bool:
    """Whether higher is better: counts and rates, not times."""
    return unit.endswith("/s") or unit in ("tokens", "requests")


def read_records(path: Path) -> list[Record]:
    """The records of a file that a Table wrote; columns that it lacks are empty."""
    frame = pd.read_csv(path, keep_default_na=False).reindex(columns=COLUMNS, fill_value="")
    found = [Record(**{str(name): value for name, value in line.items()}) for line in frame.to_dict("records")]
    return [replace(record, ratio=float(record.ratio) if record.ratio else None) for record in found]


def _medians(samples: Sequence[Record]) -> Iterator[Record]:
    """A record for each task and backend, with the median of its values."""
    frame = pd.DataFrame(samples, columns=COLUMNS)
    keys = [name for name in COLUMNS if name not in ("value", "ratio")]
    for line in frame.groupby(keys, as_index=False, sort=False)["value"].median().to_dict("records"):
        yield Record(**{str(name): value for name, value in line.items()})


class Attempts:
    """Runs measurements that may fail: the others go on, and failed ones are named at the end."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._running: list[str] = []  # names of nested measurements

    def run(self, name: str, measure: Callable[[], T]) -> T | None:
        """What ``measure`` returns, or None with its error printed."""
        self._running.append(name)
        try:
            return measure()
        except Exception:
            self.failed.append(": ".join(self._running))
            print(f"# {self.failed[-1]} failed:\n{traceback.format_exc(limit=-4)}", flush=True)
            return None
        finally:
            self._running.pop()

    def exit_code(self) -> int:
        """1 after printing the names of the failed ones, 0 if none failed."""
        if self.failed:
            print(f"# {len(self.failed)} failed: {', '.join(self.failed)}", flush=True)
        return int(bool(self.failed))


class Table:
    """A CSV file that is rewritten with every record, and NAME.environment.json with an entry for each run.

    Records are added to those of earlier runs into the same folder.
    """

    def __init__(self, path: Path, attempts: Attempts | None = None, **facts: object) -> None:
        """attempts: shared with other tables; None: its own. facts: added to the run's environment, as JSON values."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.attempts = path, attempts or Attempts()
        self.records = read_records(path) if path.exists() else []
        self._write()
        runs_path = path.with_suffix(".environment.json")
        runs = json.loads(runs_path.read_text()) if runs_path.exists() else []
        runs_path.write_text(json.dumps([*runs, {**environment(), **facts}], indent=2) + "\n")

    def add(self, record: Record) -> None:
        """Write and print a record."""
        self.records.append(record)
        self._write()
        against = f"  {record.ratio:.3f}x {record.reference}" if record.ratio is not None else ""
        what = f"{record.model:12} {record.work:16} {record.batch:>4} x {record.context:<7} {record.backend:44}"
        print(f"{what} {record.value:>9.6g} {record.unit}{against}", flush=True)

    def compare(self, record: Record, reference: Record) -> None:
        """Compare a record of this table with a reference that was measured later."""
        compared = record.beside(reference)
        self.records[self.records.index(record)] = compared
        self._write()
        shape = f"{record.batch} x {record.context}"
        print(f"    {record.work} {shape}: {compared.ratio:.3f}x {reference.backend}", flush=True)

    def add_compared(self, records: list[Record], reference: str) -> None:
        """Add times of one shape, each beside the best of those whose backend contains `reference`."""
        others = [record for record in records if reference in record.backend]
        best = min(others, key=lambda record: record.value, default=None)
        for record in records:
            self.add(record if best is None or record in others else record.beside(best))

    def add_medians(self, samples: Sequence[Record], ours: str) -> None:
        """Add the median of each task's samples by backend; those of `ours` beside the other backend's."""
        found = list(_medians(samples))
        others = {record.task: record for record in found if record.backend != ours}
        for record in found:
            is_compared = record.backend == ours and record.task in others
            self.add(record.beside(others[record.task]) if is_compared else record)

    def _write(self) -> None:
        frame = pd.DataFrame(self.records, columns=COLUMNS)
        frame["value"] = frame["value"].map("{:.6g}".format)
        frame["ratio"] = frame["ratio"].map("{:.3f}".format, na_action="ignore")
        frame.to_csv(self.path, index=False, lineterminator="\n")


def join_engines(ours: Path, theirs: Path, joined: Path) -> None:
    """Write each record that both engines have: ours with its ratio to theirs, then theirs."""
    found, mine = {record.task: record for record in read_records(theirs)}, read_records(ours)
    table = Table(joined, ours=str(ours), theirs=str(theirs))
    for record in mine:
        other = found.get(record.task)
        if other is not None and record.backend != BOUND:
            table.add(record if record.unit in NOT_COMPARED else record.beside(other))
            table.add(other)


class Budget:
    """Seconds left for measuring. Work comes most important first; what does not fit is named."""

    def __init__(self, seconds: float, attempts: Attempts) -> None:
        self._attempts = attempts
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def run(self, work: Work) -> None:
        """Run each while time is left; one that fails is reported and the next one runs."""
        skipped = []
        for name, measure in work:
            if self.left_s <= 0:
                skipped.append(name)
                continue
            print(f"# {name} ({self.left_s:.0f} s left)", flush=True)
            self._attempts.run(name, measure)
        if skipped:
            print(f"# out of time for: {', '.join(skipped)}", flush=True)
