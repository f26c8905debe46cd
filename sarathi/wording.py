"""Values in error messages."""

from __future__ import annotations

import reprlib

_MOST = 60  # characters: a message is one line
_REPR = reprlib.Repr()  # visits few elements: nested anchors in 1 kB of YAML mean billions
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxarray = 15
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 1000


def short_repr(value: object) -> str:
    """The repr of a value, cut to 60 characters, in bounded time; integers of any size are safe."""
    try:
        text = repr(value[:_MOST]) if isinstance(value, (str, bytes)) else _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to be written"
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
