"""Typed reads of a model's configuration; errors name key, value and what is allowed."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from sarathi.wording import short_repr

REQUIRED: Any = object()


class UnsupportedModelError(ValueError):
    """The configuration needs something that is not implemented; the message says what is."""


class Fields:
    """A JSON object. An absent key has its default, or is an error. prefix: put before keys in messages."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def is_null(self, key: str) -> bool:
        """Whether the key is present and null."""
        return key in self._values and self._values[key] is None

    def has_value(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self._values.get(key) is not None

    def integer(self, key: str, low: int, high: int, default: int = REQUIRED) -> int:
        """A whole number in [low, high]."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refusal(key, f"a whole number from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        """Likewise; null is None, which may differ from an absent key."""
        if self._values.get(key, default) is None:
            return None
        return self.integer(key, low, high, REQUIRED if default is None else default)

    def number(self, key: str, low: float, high: float, default: float = REQUIRED) -> float:
        """A finite number in [low, high]."""
        return self._number(key, self._get(key, default), low, high)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """Likewise; None where the key is null or absent."""
        return None if self._values.get(key) is None else self.number(key, low, high)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `count` finite numbers in [low, high]."""
        values = self._get(key, REQUIRED)
        if not isinstance(values, list | tuple) or len(values) != count:
            raise self.refusal(key, f"a list of {count} numbers")
        return tuple(self._number(key, value, low, high) for value in values)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def text(self, key: str, allowed: Collection[str], default: str = REQUIRED) -> str:
        """One of `allowed`."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.refusal(key, f"one of {', '.join(map(repr, allowed))}")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of strings; None where the key is null or absent."""
        values = self._values.get(key)
        if values is not None and (not isinstance(values, list) or not all(isinstance(each, str) for each in values)):
            raise self.refusal(key, "a list of strings")
        return values

    def inner(self, key: str) -> Mapping[str, Any]:
        """The object under `key`; empty where it is null or absent."""
        value = self._values.get(key)
        if not isinstance(value, Mapping | None):
            raise self.refusal(key, "an object")
        return value or {}

    def require(self, key: str, allowed: Collection[Any]) -> None:
        """Raise unless the key is absent, null or one of `allowed`; other values are not implemented."""
        value = self._values.get(key)
        if value is not None and not any(type(value) is type(each) and value == each for each in allowed):
            raise self.refusal(key, " or ".join(["absent", *map(repr, allowed)]))

    def refusal(self, key: str, allowed: str) -> UnsupportedModelError:
        """The error to raise for a value that is not supported."""
        value = short_repr(self._values.get(key))
        return UnsupportedModelError(f"{self._prefix}{key}={value} is not supported; it must be {allowed}")

    def _get(self, key: str, default: Any) -> Any:
        if key not in self._values and default is REQUIRED:
            raise UnsupportedModelError(f"the model's configuration has no '{self._prefix}{key}'")
        return self._values.get(key, default)

    def _number(self, key: str, value: Any, low: float, high: float) -> float:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not low <= value <= high or not math.isfinite(value):
            raise self.refusal(key, f"a number from {low:g} to {high:g}")
        return float(value)
