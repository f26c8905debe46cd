"""Read CSV traces, recognized by their columns: lengths, optionally with arrival times. Other columns are ignored."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.benchmark.workload.text_files import make_all, positive, read_text, seconds_of

Row = Mapping[str, str]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Column names of a format. counts_failures: requests without output tokens are failures."""

    prompt: str
    output: str
    time: str = ""
    counts_failures: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.time, self.prompt, self.output) if name)


LENGTHS = Columns("num_prefill_tokens", "num_decode_tokens")
TIMED = (
    Columns("num_prefill_tokens", "num_decode_tokens", "arrived_at"),  # ours, Vidur
    Columns("PromptTokenCount", "CompletionTokenCount", "Time"),  # Sarathi-Serve
    Columns("ContextTokens", "GeneratedTokens", "TIMESTAMP"),  # Azure LLM inference, 2023 and 2024
    Columns("Request tokens", "Response tokens", "Timestamp", counts_failures=True),  # BurstGPT
)
TIMED_COLUMNS = " or ".join(", ".join(columns.names) for columns in TIMED)


def read_length_csv(path: Path) -> list[RequestSpec]:
    """Requests at time zero: num_prefill_tokens and num_decode_tokens, or the columns of a trace with times."""
    rows = read_rows(path)
    columns = next((each for each in (LENGTHS, *TIMED) if _has(rows, each)), None)
    if columns is None:
        raise ValueError(
            f"{str(path)!r} has {_shown(rows)}: {' and '.join(LENGTHS.names)} must be among its columns, or "
            f"those of a trace with times: {TIMED_COLUMNS}"
        )
    return _requests(path, rows, Columns(columns.prompt, columns.output, "", columns.counts_failures))


def read_timed_csv(path: Path, date: str | None = None) -> list[RequestSpec]:
    """Requests with their arrival times; `date` selects by the column Date."""
    rows = read_rows(path)
    columns = next((each for each in TIMED if _has(rows, each)), None)
    if columns is None:
        raise ValueError(f"{str(path)!r} has {_shown(rows)}: its columns must be {TIMED_COLUMNS}")
    if date is not None and "Date" not in rows[0]:
        raise ValueError(f"trace_request_generator.date is {date!r}: {str(path)!r} has no column Date")
    return _requests(path, rows, columns, date)


def has_times(path: Path) -> bool:
    """Whether the file has the columns of a trace with arrival times."""
    rows = read_rows(path)
    return any(_has(rows, each) for each in TIMED)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The records of a CSV file as dicts."""
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is not CSV: {error}") from None


def _requests(path: Path, rows: list[dict[str, str]], columns: Columns, date: str | None = None) -> list[RequestSpec]:
    def make(row: Row) -> RequestSpec | None:
        """None for a request of another day, and for one that failed."""
        if date is not None and row["Date"] != date:
            return None
        prompt = positive(columns.prompt, row[columns.prompt])
        if columns.counts_failures and row[columns.output] == "0":
            return None
        at_s = seconds_of(row[columns.time]) if columns.time else 0.0
        return RequestSpec(at_s, prompt, positive(columns.output, row[columns.output]))

    found = [spec for spec in make_all(path, rows, make) if spec is not None]
    if len(found) < len(rows):
        logger.warning("%r: %d of %d rows are of another date or failed", str(path), len(rows) - len(found), len(rows))
    return found


def _has(rows: list[dict[str, str]], columns: Columns) -> bool:
    return bool(rows) and set(columns.names) <= set(rows[0])


def _shown(rows: list[dict[str, str]]) -> str:
    return f"the columns {', '.join(map(str, rows[0]))}" if rows else "no rows"
