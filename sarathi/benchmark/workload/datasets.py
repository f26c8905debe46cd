"""Readers of workload files: CSV of lengths, ShareGPT JSON, Mooncake JSONL. Know nothing of what is made of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sarathi.benchmark.workload.shapes import SHAPES
from sarathi.benchmark.workload.spec import RequestSpec

CountTokens = Callable[[str], int]
Row = TypeVar("Row")
Made = TypeVar("Made")
LENGTH_COLUMNS = ("num_prefill_tokens", "num_decode_tokens")
TIME_COLUMNS = {
    ("arrived_at", *LENGTH_COLUMNS): "arrived_at",
    ("Time", "PromptTokenCount", "CompletionTokenCount"): "Time",
}


def read_lengths(name: str, count_tokens: CountTokens | None = None) -> list[RequestSpec]:
    """Requests of a file, all at time zero, by its ending: .csv, .json (ShareGPT) or .jsonl (Mooncake)."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is no file and no shipped shape; shapes are {', '.join(SHAPES)}")
    if path.suffix == ".jsonl":
        return [replace(row, arrived_at_s=0.0) for row in read_mooncake(path)]
    if path.suffix == ".json":
        return list(read_sharegpt(path, count_tokens))
    return read_length_csv(path)


def read_arrivals(name: str, date: str | None = None) -> list[RequestSpec]:
    """Requests of a file with their arrival times: Mooncake .jsonl, or .csv; `date` selects by the column Date."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"trace_request_generator.trace_file is {name!r}: there is no such file")
    if path.suffix != ".jsonl":
        return read_arrival_csv(path, date)
    if date is not None:
        raise ValueError(f"trace_request_generator.date is {date!r}: it must be none for {name!r}, which has no dates")
    return read_mooncake(path)


def read_length_csv(path: Path) -> list[RequestSpec]:
    """Columns num_prefill_tokens and num_decode_tokens, whole numbers however written; others are ignored."""
    rows = _read_csv(path)
    _check_columns(path, rows, LENGTH_COLUMNS)
    prompt, output = LENGTH_COLUMNS
    return _make_all(path, rows, lambda row: RequestSpec(0.0, _tokens(row[prompt]), _tokens(row[output])))


def read_arrival_csv(path: Path, date: str | None) -> list[RequestSpec]:
    """Columns arrived_at, num_prefill_tokens, num_decode_tokens, or Time, PromptTokenCount, CompletionTokenCount."""
    rows = [row for row in _read_csv(path) if date is None or row.get("Date") == date]
    known = next((columns for columns in TIME_COLUMNS if rows and set(columns) <= set(rows[0])), None)
    if known is None:
        wanted = " or ".join(", ".join(columns) for columns in TIME_COLUMNS)
        raise ValueError(
            f"{str(path)!r} has {len(rows)} rows{f' of {date}' if date else ''}; its columns must be {wanted}"
        )
    time, prompt, output = known
    return _make_all(path, rows, lambda row: RequestSpec(_time(row[time]), _tokens(row[prompt]), _tokens(row[output])))


def read_mooncake(path: Path) -> list[RequestSpec]:
    """One JSON object a line: timestamp (ms), input_length, output_length, hash_ids of 512-token blocks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return _make_all(path, [line for line in lines if line.strip()], _mooncake_row)


def _mooncake_row(line: str) -> RequestSpec:
    row = json.loads(line)
    lengths = int(row["input_length"]), max(int(row["output_length"]), 1)
    return RequestSpec(_time(row["timestamp"]) / 1e3, *lengths, None, tuple(row.get("hash_ids", ())))


def read_sharegpt(
    path: Path, count_tokens: CountTokens | None, rng: np.random.Generator | None = None
) -> Iterator[RequestSpec]:
    """The first question and answer of each conversation, in the file's order or in one that `rng` draws.

    Those without both, or under 4 tokens, are left out. Tokens are counted as requests are taken: the usual file has
    90,000 conversations.
    """
    if count_tokens is None:
        raise ValueError(f"{str(path)!r} holds text: counting its tokens needs a model with a tokenizer")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} holds a {type(entries).__name__}: it must hold a list of conversations")
    talks = _make_all(path, entries, _turns)
    order = range(len(talks)) if rng is None else rng.permutation(len(talks))
    for turns in (talks[place] for place in order):
        if len(turns) == 2:
            prompt, output = (count_tokens(turn) for turn in turns)
            if min(prompt, output) >= 4:
                yield RequestSpec(0.0, prompt, output, turns[0])


def _turns(entry: Mapping[str, Any]) -> list[str]:
    turns = [turn["value"] for turn in entry.get("conversations") or entry.get("conversation") or ()][:2]
    if not all(isinstance(turn, str) for turn in turns):
        raise ValueError("a turn's value must be text")
    return turns


def _make_all(path: Path, rows: Iterable[Row], make: Callable[[Row], Made]) -> list[Made]:
    """What is made of each row; ValueError names the first row of which nothing can be made."""
    return [_make(path, number, row, make) for number, row in enumerate(rows, 1)]


def _make(path: Path, number: int, row: Row, make: Callable[[Row], Made]) -> Made:
    try:
        return make(row)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{str(path)!r}, row {number}, {row!r:.200}: {told}") from None


def _read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
        try:
            return list(csv.DictReader(file))
        except csv.Error as error:
            raise ValueError(f"{str(path)!r} is not CSV: {error}") from None


def _check_columns(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...]) -> None:
    if not rows or not set(columns) <= set(rows[0]):
        found = list(rows[0]) if rows else "no rows"
        raise ValueError(f"{str(path)!r} has {found}: {' and '.join(columns)} must be among its columns")


def _tokens(text: str) -> int:
    return max(round(float(text)), 1)


def _time(value: str | float) -> float:
    at = float(value)
    if not math.isfinite(at):
        raise ValueError(f"{value!r} is no time")
    return at
