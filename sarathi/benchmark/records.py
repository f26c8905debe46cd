"""Measurement records in a CSV file, and a time budget for measuring them."""

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
from sarathi.metrics.files import open_replacing

T = TypeVar("T")
Work = Iterable[tuple[str, Callable[[], object]]]  # (name, function) of each measurement
NOT_COMPARED = ("MHz", "W")  # units in which neither higher nor lower is better
BOUND = "products and attention alone"  # the backend of records of roofline.py


@dataclass(frozen=True)
class Record:
    """One measurement. ratio: to that of backend `reference`; above 1 is better."""

    model: str
    work: str
    backend: str
    batch: int
    context: int
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None

    def compared_to(self, other: Record) -> Record:
        """This record with `other` as its reference."""
        ratio = self.value / other.value if is_rate(self.unit) else other.value / self.value
        return replace(self, reference=other.backend, ratio=ratio)

    @property
    def task(self) -> tuple[object, ...]:
        """Key of records that can be compared: everything but backend and value."""
        return self.model, self.work, self.batch, self.context, self.unit


COLUMNS = [field.name for field in fields(Record)]


def is_rate(unit: str) -> bool:
    """Whether higher is better: true for counts and rates, false for times."""
    return unit.endswith("/s") or unit in ("tokens", "requests")


def read_records(path: Path) -> list[Record]:
    """The records of a Table's file; missing columns are empty."""
    frame = pd.read_csv(path, keep_default_na=False).reindex(columns=COLUMNS, fill_value="")
    found = [Record(**{str(name): value for name, value in line.items()}) for line in frame.to_dict("records")]
    return [replace(record, ratio=float(record.ratio) if record.ratio else None) for record in found]


def _medians(samples: Sequence[Record]) -> Iterator[Record]:
    """The median of each task and backend."""
    frame = pd.DataFrame(samples, columns=COLUMNS)
    keys = [name for name in COLUMNS if name not in ("value", "ratio")]
    for line in frame.groupby(keys, as_index=False, sort=False)["value"].median().to_dict("records"):
        yield Record(**{str(name): value for name, value in line.items()})


class Attempts:
    """Runs measurements and collects failures, so that one failure does not stop the others."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._running: list[str] = []  # names of nested measurements

    def run(self, name: str, measure: Callable[[], T]) -> T | None:
        """The result of ``measure``; on an exception, prints it and returns None."""
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
        """Print the failed measurements; 1 if there are any, else 0."""
        if self.failed:
            print(f"# {len(self.failed)} failed: {', '.join(self.failed)}", flush=True)
        return int(bool(self.failed))


class Table:
    """A CSV file that is rewritten with every record, and NAME.environment.json with an entry for each run.

    Records of earlier runs into the same file are kept.
    """

    def __init__(self, path: Path, attempts: Attempts | None = None, **facts: object) -> None:
        """attempts: shared with other tables; None: its own. facts: added to the run's environment, as JSON values."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.attempts = path, attempts or Attempts()
        self.records = read_records(path) if path.exists() else []
        self._write()
        runs_path = path.with_suffix(".environment.json")
        runs = json.loads(runs_path.read_text()) if runs_path.exists() else []
        with open_replacing(runs_path) as file:
            file.write(json.dumps([*runs, {**environment(), **facts}], indent=2) + "\n")

    def add(self, record: Record) -> None:
        """Write and print a record."""
        self.records.append(record)
        self._write()
        against = f"  {record.ratio:.3f}x {record.reference}" if record.ratio is not None else ""
        what = f"{record.model:12} {record.work:16} {record.batch:>4} x {record.context:<7} {record.backend:44}"
        print(f"{what} {record.value:>9.6g} {record.unit}{against}", flush=True)

    def compare(self, record: Record, reference: Record) -> None:
        """Set the reference of a record that was measured before its reference."""
        compared = record.compared_to(reference)
        self.records[self.records.index(record)] = compared
        self._write()
        shape = f"{record.batch} x {record.context}"
        print(f"    {record.work} {shape}: {compared.ratio:.3f}x {reference.backend}", flush=True)

    def add_compared(self, records: list[Record], reference: str) -> None:
        """Add times of one shape, compared with the best backend whose name contains `reference`."""
        others = [record for record in records if reference in record.backend]
        best = min(others, key=lambda record: record.value, default=None)
        for record in records:
            self.add(record if best is None or record in others else record.compared_to(best))

    def add_medians(self, samples: Sequence[Record], ours: str) -> None:
        """Add the median of each task and backend; those of `ours` are compared with the other backend's."""
        found = list(_medians(samples))
        others = {record.task: record for record in found if record.backend != ours}
        for record in found:
            is_compared = record.backend == ours and record.task in others
            self.add(record.compared_to(others[record.task]) if is_compared else record)

    def _write(self) -> None:
        frame = pd.DataFrame(self.records, columns=COLUMNS)
        frame["value"] = frame["value"].map("{:.6g}".format)
        frame["ratio"] = frame["ratio"].map("{:.3f}".format, na_action="ignore")
        with open_replacing(self.path) as file:
            frame.to_csv(file, index=False, lineterminator="\n")


def join_engines(ours: Path, theirs: Path, joined: Path) -> None:
    """Write the records that both engines have: ours with its ratio to theirs, then theirs."""
    found, mine = {record.task: record for record in read_records(theirs)}, read_records(ours)
    table = Table(joined, ours=str(ours), theirs=str(theirs))
    for record in mine:
        other = found.get(record.task)
        if other is not None and record.backend != BOUND:
            table.add(record if record.unit in NOT_COMPARED else record.compared_to(other))
            table.add(other)


class Budget:
    """A time budget. Runs work in the given order and lists what it had no time for."""

    def __init__(self, seconds: float, attempts: Attempts) -> None:
        self._attempts = attempts
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def run(self, work: Work) -> None:
        """Run each measurement while time is left. A failure is reported and does not stop the others."""
        skipped = []
        for name, measure in work:
            if self.left_s <= 0:
                skipped.append(name)
                continue
            print(f"# {name} ({self.left_s:.0f} s left)", flush=True)
            self._attempts.run(name, measure)
        if skipped:
            print(f"# out of time for: {', '.join(skipped)}", flush=True)
