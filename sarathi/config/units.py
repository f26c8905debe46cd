"""Sizes in bytes as text, and the nearest of known words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from sarathi.wording import short_repr

_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([kmgt]?)i?(b?)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of "64kb", "2 MiB", "1.5g" or "4096"; units are powers of 1024. ValueError for other text."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{short_repr(text)} is not a size: write bytes, or a number with kb, mb, gb or tb, of at most 20 digits"
        )
    number, prefix, _ = match.groups()
    factor = _UNITS[f"{prefix.lower()}b"]
    return int(number) * factor if number.isdigit() else round(float(number) * factor)


def format_bytes(num_bytes: int) -> str:
    """The shortest exact form that parse_bytes reads back: 65536 -> "64kb"."""
    for unit in ("tb", "gb", "mb", "kb"):
        if num_bytes and num_bytes % _UNITS[unit] == 0:
            return f"{num_bytes // _UNITS[unit]}{unit}"
    return str(num_bytes)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most similar to `word`, however different."""

    def similarity(candidate: str) -> float:
        return difflib.SequenceMatcher(None, word.lower(), candidate.lower()).ratio()

    return max(known, key=similarity)
