"""Result files. Writes are atomic: to a temporary file that is then renamed."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sarathi.metrics.tables import Table

PART_SUFFIX = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path: renamed to `path` at the end of the block, removed if the block raises."""
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def open_replacing(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file without newline translation, renamed to `path` at the end of the block."""
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        yield file


def write_table(path: Path, table: Table) -> None:
    """Write a CSV file with a header. None is an empty cell; keys that are not columns are ignored."""
    with open_replacing(path) as file:
        writer = csv.DictWriter(file, table.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.records)


def write_columns(path: Path, names: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    """Write a CSV file whose header is `names`."""
    with open_replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON. Values that JSON cannot represent, such as paths, become strings."""
    with open_replacing(path) as file:
        file.write(json.dumps(content, indent=2, default=str) + "\n")


def is_file_name(name: object) -> bool:
    """Whether `name` is a plain file name: a string without path separators, not empty, "." or ".."."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(char in name for char in "/\\\0")
