"""Workload files by their ending: .csv, .jsonl, .json, .txt, each of them also as .gz."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from sarathi.benchmark.workload.formats.csv_traces import read_length_csv, read_timed_csv
from sarathi.benchmark.workload.formats.files import format_of
from sarathi.benchmark.workload.formats.json_lines import read_json_lines
from sarathi.benchmark.workload.formats.texts import CountTokens, read_sharegpt, read_sonnet
from sarathi.benchmark.workload.shapes import SHAPES
from sarathi.benchmark.workload.spec import RequestSpec

NUM_SONNETS = 1000  # of the endless prompts of a poem


def read_lengths(name: str, count_tokens: CountTokens | None = None, seed: int = 0) -> list[RequestSpec]:
    """Requests of a file, all at time zero: CSV, Mooncake or Bailian .jsonl, ShareGPT .json, a poem's .txt.

    seed: draws the lines of a poem. ValueError names the file, and the row where one is wrong.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is no file and no shipped shape; shapes are {', '.join(SHAPES)}")
    kind = format_of(path)
    if kind == ".jsonl":
        return [replace(row, arrived_at_s=0.0) for row in read_json_lines(path)]
    if kind == ".json":
        return list(read_sharegpt(path, count_tokens))
    if kind == ".txt":
        return list(islice(read_sonnet(path, count_tokens, np.random.default_rng(seed)), NUM_SONNETS))
    return read_length_csv(path)


def read_arrivals(name: str, date: str | None = None) -> list[RequestSpec]:
    """Requests of a file with their arrival times: Mooncake or Bailian .jsonl, or .csv, of one Date if one is given."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"trace_request_generator.trace_file is {name!r}: there is no such file")
    if format_of(path) != ".jsonl":
        return read_timed_csv(path, date)
    if date is not None:
        raise ValueError(f"trace_request_generator.date is {date!r}: it must be none for {name!r}, which has no dates")
    return read_json_lines(path)
