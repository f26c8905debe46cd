"""Every saved seed, and a few broken copies of each, through its reader; `run.py` does it for minutes."""

import random
from contextlib import suppress

import pytest
from mutations import broken_bytes, broken_json, broken_lines
from readers import READERS, json_of, read_bytes, seeds_of


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_read_or_refused(name: str) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for path in seeds_of(name):
        content = path.read_bytes()
        document = json_of(content) if READERS[name].is_text else None
        copies = [content, broken_bytes(content, rng), broken_bytes(content, rng)]
        copies += [broken_lines(content, rng)] if READERS[name].is_text else []
        copies += [broken_json(document, rng), broken_json(document, rng)] if document is not None else []
        for each in copies:
            with suppress(ValueError):
                read_bytes(name, each, path)


def test_seeds_that_are_whole_are_read() -> None:
    for name in READERS:
        for path in seeds_of(name):
            if not path.name.startswith("found-"):
                read_bytes(name, path.read_bytes(), path)
