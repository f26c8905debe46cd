"""Whether a caller's object is an integer or a list. Arrays of numpy and torch are recognised by `ndim`."""

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_integer(value: object) -> bool:
    """Of arrays, only one without dimensions is an integer: [7] can serve as an index too, but is a list."""
    return isinstance(value, int) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


def is_list(value: object) -> TypeGuard[Any]:
    """Whether it has a length and items by position, as lists, tuples and arrays have. Text and bytes do not count, nor
    do dicts, sets, views and iterators."""
    if isinstance(value, (str, bytes, bytearray, Mapping)) or getattr(value, "ndim", 1) == 0:
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")
