"""Helpers of the trace readers: text files (gzip, byte order marks), values of rows, timestamps.

Errors name the file and the row. Timestamps are parsed alike on every Python version.
"""

from __future__ import annotations

import codecs
import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?)?\s*(Z|[+-]\d\d:?\d\d)?", re.IGNORECASE
)
Row = TypeVar("Row")
Made = TypeVar("Made")
_GZIP_MAGIC = b"\x1f\x8b"
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """The whole file as UTF-8. ValueError if it is not valid, with the line of the first invalid byte."""
    data = _read_bytes(path)
    if data.startswith(_UTF_16_MARKS):
        raise ValueError(f"{str(path)!r} is UTF-16: it must be UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{str(path)!r}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None


def format_of(path: Path) -> str:
    """The file's suffix without .gz: .csv for a.csv.gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def make_all(path: Path, rows: Iterable[Row], make: Callable[[Row], Made]) -> list[Made]:
    """Apply `make` to each row. ValueError names the first invalid row."""
    return [_make(path, number, row, make) for number, row in enumerate(rows, 1)]


def positive(name: str, value: object) -> int:
    """Convert a token count, an integer of at least 1; 12.0 is accepted."""
    number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    if number is None or number != round(number) or number < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1")
    return round(number)


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be unpacked as gzip: {error}") from None


def _make(path: Path, number: int, row: Row, make: Callable[[Row], Made]) -> Made:
    try:
        return make(row)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{str(path)!r}, row {number}, {row!r:.200}: {told}") from None


def seconds_of(value: object) -> float:
    """Parse seconds, or a timestamp as seconds since 1970 (default zone: UTC).

    Fractions of a second may have any number of digits; the first six count.
    """
    if isinstance(value, str):
        found = _DATE.fullmatch(value.strip())
        if found is not None:
            return _seconds_of_date(found)
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{value!r} is no time: write seconds, or as 2024-05-01 12:00:00")
    return seconds


def _seconds_of_date(found: re.Match[str]) -> float:
    *parts, fraction, zone = found.groups()
    year, month, day, hour, minute, second = (int(part or 0) for part in parts)
    microsecond = int((fraction or "0")[:6].ljust(6, "0"))
    return datetime(year, month, day, hour, minute, second, microsecond, _zone(zone)).timestamp()


def _zone(text: str | None) -> timezone:
    if text is None or text.upper() == "Z":
        return timezone.utc
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[-2:]))
    return timezone(-offset if text[0] == "-" else offset)
