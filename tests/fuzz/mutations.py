"""Ways to break a file: its bytes, the values of its JSON, or its lines."""

import copy
import json
import random
from typing import Any

_NUMBERS = (0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 10**30, -(2**63))
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "\udc80", "a" * 3000, [], {}, [[]], [None], {"a": None},
    0.5, -1.5, 1e308, float("nan"), float("inf"), *_NUMBERS,
)  # fmt: skip


def broken_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four edits: a byte, an 8- or 4-byte number, a cut, a piece twice or gone."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _edit_bytes(data, rng)
    return bytes(data)


def broken_json(document: Any, rng: random.Random) -> bytes:
    """One to three values replaced, removed or moved."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            break
        container, key = rng.choice(places)
        _edit_value(container, key, document, rng)
    return json.dumps(document).encode()


def broken_lines(content: bytes, rng: random.Random) -> bytes:
    """A field of a line replaced, or a line twice, gone or moved."""
    lines = content.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        separator = rng.choice((",", ":", " "))
        fields = lines[at].split(separator)
        fields[rng.randrange(len(fields))] = str(rng.choice(_VALUES))
        lines[at] = separator.join(fields)
    elif kind == 1:
        lines.insert(at, rng.choice(lines))
    elif kind == 2:
        lines[at] = rng.choice(("", "  " + lines[at], lines[at].strip(), "- " + lines[at], "&a [*a, *a]", "<<: *a"))
    else:
        del lines[at]
    return "\n".join(lines).encode("utf-8", "replace")


def _edit_bytes(data: bytearray, rng: random.Random) -> None:
    if not data:
        data.extend(rng.randbytes(8))
        return
    at, kind = rng.randrange(len(data)), rng.randrange(6)
    if kind == 0:
        data[at] = rng.randrange(256)
    elif kind == 1:
        data[at : at + 8] = (rng.choice(_NUMBERS) % 2**64).to_bytes(8, "little")
    elif kind == 2:
        data[at : at + 4] = (rng.choice(_NUMBERS) % 2**32).to_bytes(4, "little")
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + rng.randint(1, 16)]
    else:
        data[at:at] = data[at : at + rng.randint(1, 64)]


def _places(value: Any) -> Any:
    """Every (container, key) of a document."""
    stack = [value]
    while stack:
        container = stack.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            yield container, key
            if isinstance(container[key], dict | list):
                stack.append(container[key])


def _edit_value(container: Any, key: Any, document: Any, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = copy.deepcopy(rng.choice([owner[name] for owner, name in _places(document)]))
    elif kind == 2 and isinstance(container, dict):
        container[rng.choice(("", "x", "type", "a" * 200))] = container.pop(key)
    else:
        container[key] = copy.deepcopy(rng.choice(_VALUES))
