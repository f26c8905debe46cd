"""Whether a caller's object is one integer or a list of things; knows numpy's and torch's arrays by `ndim` alone."""

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_integer(value: object) -> bool:
    """Of arrays only one without dimensions is: one of one element can serve as an index too, but is a list."""
    return isinstance(value, int) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


def is_list(value: object) -> TypeGuard[Any]:
    """Whether things stand in it at places, as in lists, tuples and arrays. Text is none, nor bytes, nor what has no
    order or no length: dicts, sets, views, iterators."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or getattr(value, "ndim", 1) == 0:
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")
