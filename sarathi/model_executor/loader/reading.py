"""For readers of files: a broken file raises a ValueError that names it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A file that cannot be read or does not hold what the model needs; the message names file and tensor or key."""


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turns every error while reading `path` into a CheckpointError. what: kind of file, for the message.

    On broken files parsers raise KeyError, TypeError, UnicodeError and others; those written in Rust panic, with an
    exception that is not a subclass of Exception.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not is_panic:
            raise  # KeyboardInterrupt and the like
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{path}: corrupt or unreadable {what}: {name}{error}") from error


def read_json(path: Path) -> Mapping[str, Any]:
    """Reads a JSON object; raises CheckpointError for anything else."""
    with reading(path, "JSON configuration"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a configuration is a JSON object, this is a {type(config).__name__}")
        return config
