"""JSON lines of Mooncake (milliseconds, blocks of 512 tokens) and Qwen-Bailian (seconds, blocks of 16 tokens)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.benchmark.workload.text_files import make_all, positive, read_text, seconds_of


@dataclass(frozen=True)
class Dialect:
    """Units of a trace. seconds: per unit of its timestamps. block_tokens: per hash_id."""

    name: str
    seconds: float
    block_tokens: int

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the number of hash_ids matches the prompt's length; the last block may be partial."""
        ids = row.get("hash_ids") or ()
        return not ids or len(ids) == -(-row["input_length"] // self.block_tokens)


MOONCAKE, BAILIAN = Dialect("Mooncake", 1e-3, 512), Dialect("Qwen-Bailian", 1.0, 16)


def read_json_lines(path: Path) -> list[RequestSpec]:
    """Requests with arrival times. The dialect is detected: its block size fits every row, and Bailian has chat_id."""
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    rows = make_all(path, lines, _row)
    dialects = (BAILIAN, MOONCAKE) if rows and "chat_id" in rows[0] else (MOONCAKE, BAILIAN)
    dialect = next((each for each in dialects if all(map(each.fits, rows))), None)
    if dialect is None:
        number = next(number for number, row in enumerate(rows, 1) if not dialects[0].fits(row))
        row = rows[number - 1]
        known = " nor ".join(f"of {each.block_tokens} tokens ({each.name})" for each in dialects)
        raise ValueError(
            f"{str(path)!r}, row {number}: {len(row['hash_ids'])} hash_ids for {row['input_length']} tokens; the "
            f"file's blocks are neither {known}"
        )
    return [_request(row, dialect) for row in rows]


def _row(line: str) -> dict[str, Any]:
    """Parse and check a line."""
    row = json.loads(line)
    lengths = {name: positive(name, row[name]) for name in ("input_length", "output_length")}
    if not isinstance(row["timestamp"], (int, float)):
        raise ValueError(f"timestamp is {row['timestamp']!r}: it must be a number")
    ids = row.get("hash_ids") or []
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        raise ValueError("hash_ids must be a list of integers, at least 0")
    return {**row, **lengths, "timestamp": seconds_of(row["timestamp"]), "hash_ids": ids}


def _request(row: Mapping[str, Any], dialect: Dialect) -> RequestSpec:
    return RequestSpec(
        row["timestamp"] * dialect.seconds, row["input_length"], row["output_length"], None, tuple(row["hash_ids"]),
        dialect.block_tokens,
    )  # fmt: skip
