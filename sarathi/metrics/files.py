"""Files of a result. Each is written beside its place and renamed, so a reader never finds a part of one."""

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
    """A path to write to, which becomes `path` at the end of the block, or is removed if the block raises."""
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def open_replacing(path: Path) -> Iterator[TextIO]:
    """A text file in UTF-8, lines ended by what is written, that becomes `path` at the end of the block."""
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        yield file


def write_table(path: Path, table: Table) -> None:
    """A CSV file with a header; None is an empty cell, values of columns that the table does not name are left out."""
    with open_replacing(path) as file:
        writer = csv.DictWriter(file, table.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.records)


def write_columns(path: Path, names: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    """A CSV file with a header of `names`."""
    with open_replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON; values that JSON does not have, such as paths, are written as text."""
    with open_replacing(path) as file:
        file.write(json.dumps(content, indent=2, default=str) + "\n")


def is_file_name(name: object) -> bool:
    """Whether `name` names a file directly in a folder: text without a separator, not empty, "." or ".."."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(char in name for char in "/\\\0")
