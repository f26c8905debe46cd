"""Values as error messages show them; knows none of the values."""

from __future__ import annotations

_MOST = 60  # characters: a message is one line


def short_repr(value: object) -> str:
    """The repr of a value, shortened where it is longer than 60 characters; never raises for an integer."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to be written"
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
