"""Interleaved measurement of two checkouts.

Each engine has a process of its own. Every round runs each task on both, in alternating order, so that clocks, heat
and other load affect both alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sarathi.benchmark.records import is_rate
from sarathi.benchmark.revisions import worker
from sarathi.metrics.files import open_replacing

KEY = ["model", "backend", "work", "batch", "context", "unit"]
SAMPLES = ["revision", "round", "value", *KEY]
SIDES = ("before", "after")
FIRST_START, START = "first start to first token", "start to first token"


class Task(NamedTuple):
    """One measurement: its columns in the table, and the request to the worker."""

    work: str
    batch: int
    context: int
    unit: str
    request: dict[str, object]


class Engine:
    """A worker process over one checkout."""

    def __init__(self, checkout: Path, settings: Mapping[str, object]) -> None:
        """Start it and wait for its first token. RuntimeError if it exits or imports another checkout."""
        folder = str(checkout.resolve())
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *_other_paths()])}
        source = Path(worker.__file__).read_text(encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
            env=environment,
        )  # fmt: skip
        try:
            first = self._ask(settings)
            if Path(first["package"]).parent != checkout.resolve():
                raise RuntimeError(f"{folder}: sarathi was imported from {first['package']}")
        except BaseException:
            self.close()
            raise
        self.start_s = float(first["value"])

    def measure(self, request: Mapping[str, object]) -> float:
        """Measure one task. RuntimeError with the worker's error message."""
        reply = self._ask(request)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return float(reply["value"])

    def close(self) -> None:
        """End the process and wait until its memory is released."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, message: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # the missing reply says so too
            print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with code {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def _other_paths() -> list[str]:
    """PYTHONPATH without checkouts of this package."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [path for path in paths if path and not (Path(path) / "sarathi").is_dir()]


@dataclass
class Samples:
    """All measured values. After each, rewrites two CSV files: the samples, and the ratios by task.

    Appends to an existing file of samples.
    """

    folder: Path
    values: pd.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path
        self.values = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=SAMPLES)

    def add(self, model: str, backend: str, task: Task, pair: Mapping[str, float], number: int) -> None:
        """Add the values of both sides for one task in one round."""
        key = [model, backend, task.work, task.batch, task.context, task.unit]
        new = pd.DataFrame([[side, number, pair[side], *key] for side in SIDES], columns=SAMPLES)
        self.values = new if self.values.empty else pd.concat([self.values, new], ignore_index=True)
        with open_replacing(self._path) as file:
            self.values.to_csv(file, index=False, float_format="%.8g")
        with open_replacing(self.folder / "revisions.csv") as file:
            self.ratios().to_csv(file, index=False, float_format="%.6g")

    @property
    def _path(self) -> Path:
        return self.folder / "revisions_samples.csv"

    def ratios(self) -> pd.DataFrame:
        """Medians of both sides and their ratio (> 1: `after` is better), with minimum and maximum over rounds."""
        numbered = self.values.assign(  # rounds of continued runs begin at 0 again
            sample=self.values.groupby([*KEY, "revision"]).cumcount()
        )
        pairs = numbered.pivot(index=[*KEY, "sample"], columns="revision", values="value").reindex(columns=SIDES)
        pairs = pairs.assign(ratio=_gains(pairs.reset_index()).to_numpy())
        found = pairs.groupby(KEY, sort=False).agg(
            before=("before", "median"), after=("after", "median"), lowest_ratio=("ratio", "min"),
            highest_ratio=("ratio", "max"), rounds=("ratio", "size"),
        ).reset_index()  # fmt: skip
        found.insert(len(KEY) + len(SIDES), "ratio", _gains(found))
        return found


def gain(before: float, after: float, unit: str) -> float:
    """> 1 if `after` is better: after / before for rates, before / after for times."""
    return after / before if is_rate(unit) else before / after


def _gains(pairs: pd.DataFrame) -> pd.Series:
    return pd.Series([gain(*pair) for pair in zip(pairs["before"], pairs["after"], pairs["unit"], strict=True)])


@dataclass(frozen=True)
class Comparison:
    """What to compare. settings: of every engine, besides model and backend. seconds: time limit for new tasks."""

    checkouts: Mapping[str, Path]
    models: Mapping[str, str]  # name in the table -> the engine's model
    backends: Sequence[str]
    settings: Mapping[str, object]
    tasks: Sequence[Task]
    starts: int
    rounds: int
    seconds: float

    def run(self, samples: Samples) -> list[str]:
        """Measure each model and backend for its share of the time. Returns descriptions of the failures."""
        pairs, failed, start_s = [(m, b) for m in self.models for b in self.backends], [], time.monotonic()
        for index, (model, backend) in enumerate(pairs):
            end_s = start_s + self.seconds * (index + 1) / len(pairs)
            if time.monotonic() >= end_s:
                failed.append(f"{model} {backend}: out of time")
                continue
            print(f"# {model} {backend}, {end_s - time.monotonic():.0f} s", flush=True)
            try:
                failed += self._measure_pair(model, backend, samples, end_s)
            except RuntimeError as error:
                failed.append(f"{model} {backend}: {error}")
        return failed

    def _measure_pair(self, model: str, backend: str, samples: Samples, end_s: float) -> list[str]:
        settings = {**self.settings, "model": self.models[model], "attention_backend": backend}
        engines: dict[str, Engine] = {}
        try:
            for number in range(self.starts):
                _close(engines)
                for side in _in_order(number):
                    engines[side] = Engine(self.checkouts[side], settings)
                task = Task(START if number else FIRST_START, 1, 16, "s", {})
                started = {side: engine.start_s for side, engine in engines.items()}
                _tell(task, started)
                samples.add(model, backend, task, started, number)
            return self._measure_tasks(engines, lambda *args: samples.add(model, backend, *args), end_s)
        finally:
            _close(engines)

    def _measure_tasks(self, engines: Mapping[str, Engine], add: Any, end_s: float) -> list[str]:
        """Run every task once per round; a failed task is not repeated."""
        failed: dict[str, str] = {}
        for engine in engines.values() if self.tasks else ():
            engine.measure({"task": "warm_up", "tokens": max(task.context for task in self.tasks) // 4})
        for number in range(self.rounds):
            for task in self.tasks:
                name = f"{task.work} {task.batch} x {task.context}"
                if name in failed:
                    continue
                if time.monotonic() >= end_s:
                    return [*failed.values(), *([f"{name}: out of time"] if not number else [])]
                try:
                    pair = {side: engines[side].measure(task.request) for side in _in_order(number)}
                except RuntimeError as error:
                    failed[name] = f"{name}: {error}"
                    continue
                _tell(task, pair)
                add(task, pair, number)
        return list(failed.values())


def _in_order(number: int) -> Iterator[str]:
    """The two sides, in alternating order from round to round."""
    return iter(SIDES if number % 2 == 0 else SIDES[::-1])


def _close(engines: dict[str, Engine]) -> None:
    while engines:
        engines.popitem()[1].close()


def _tell(task: Task, pair: Mapping[str, float]) -> None:
    before, after = (pair[side] for side in SIDES)
    shape = f"{task.batch:>4} x {task.context:<6}"
    ratio = gain(before, after, task.unit)
    print(f"{task.work:32} {shape} {before:>10.5g} {after:>10.5g} {task.unit:16} {ratio:.3f}x", flush=True)
