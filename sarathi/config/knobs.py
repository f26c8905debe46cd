"""Knobs: fields of configuration sections, with help text and limits.

A section is a frozen dataclass derived from Section whose fields are made by knob(). Validation, command line options
and documentation are derived from these fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Union, get_args, get_origin, get_type_hints

from sarathi.config.units import nearest, parse_bytes
from sarathi.wording import short_repr

_METADATA_KEY = "knob"
_WORDS_FOR_NONE = ("none", "null", "")
_TRUE_WORDS, _FALSE_WORDS = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")
_WORDS_FOR_BOOL = {**dict.fromkeys(_TRUE_WORDS, True), **dict.fromkeys(_FALSE_WORDS, False)}


class ConfigError(ValueError):
    """An unknown knob, or an invalid value; the message names the knob, the value, and what is allowed."""


@dataclass(frozen=True)
class Limits:
    """Values that a knob accepts, beyond its type. unit: "bytes" also accepts sizes such as "8gb"."""

    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    unit: str = ""


@dataclass(frozen=True)
class Knob:
    """One field of a configuration. path: dotted, from the root."""

    path: str
    value_type: type
    optional: bool
    default: object
    help: str
    limits: Limits

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def flat(self) -> str:
        return self.path.replace(".", "_")

    @property
    def tail(self) -> str:
        """The last two parts in one word: chunk_budget_policy."""
        return "_".join(self.path.split(".")[-2:])

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        words = _TYPE_WORDS.get(self.value_type, "a name")
        if self.limits.choices:
            words = "one of " + ", ".join(self.limits.choices)
        low, high = self.limits.low, self.limits.high
        if low > -math.inf and high < math.inf:
            words += f" from {_limit(low)} to {_limit(high)}"
        elif low > -math.inf:
            words += f", at least {_limit(low)}"
        return f"{words}, or none" if self.optional else words

    def coerce(self, value: object) -> object:
        """`value`, typed or as written on a command line, converted to the field's type; ConfigError if impossible.

        Types other than str, int, float and bool have a classmethod `parse(text)`, which raises ValueError.
        """
        if value is None or (self.optional and isinstance(value, str) and value.lower() in _WORDS_FOR_NONE):
            if self.optional:
                return None
            raise self._refusal(value)
        if self.value_type not in _READERS:
            return self._parsed(value)
        try:
            typed = _READERS[self.value_type](value, self.limits)
        except (OverflowError, TypeError, ValueError):
            raise self._refusal(value) from None
        if isinstance(typed, (int, float)) and not self.limits.low <= typed <= self.limits.high:
            raise self._refusal(value)
        return typed

    def _parsed(self, value: object) -> object:
        if isinstance(value, self.value_type):
            return value
        if not isinstance(value, str):
            raise self._refusal(value)
        return self.value_type.parse(value)  # type: ignore[attr-defined]

    def _refusal(self, value: object) -> ConfigError:
        hint = ""
        if self.limits.choices and isinstance(value, str) and value:
            hint = f"; the nearest is {nearest(value, self.limits.choices)!r}"
        return ConfigError(f"{self.path} is {short_repr(value)}: it must be {self.allowed}{hint}")


def knob(default: Any, help: str, **limits: Any) -> Any:
    """A field of a section: its default, its explanation, and the fields of Limits as keywords."""
    return dataclasses.field(default=default, metadata={_METADATA_KEY: (help, Limits(**limits))})


@dataclass(frozen=True)
class Section:
    """Base of configuration sections: the constructor validates and converts values."""

    def __post_init__(self) -> None:
        for each in knobs_of(type(self), type(self).__name__ + "."):
            if each.path.count(".") == 1:
                object.__setattr__(self, each.leaf, each.coerce(getattr(self, each.leaf)))


def knobs_of(section: type[Section], prefix: str = "") -> tuple[Knob, ...]:
    """All knobs of a section and of its nested sections, in order of definition."""
    key: Any = section  # mypy: not Hashable
    return _knobs_of(key, prefix)


def sections_of(section: type[Section]) -> Mapping[str, type[Section]]:
    """Nested sections by field name, one level deep."""
    key: Any = section
    return _sections_of(key)


@functools.cache  # called hundreds of times for one configuration
def _knobs_of(section: Any, prefix: str) -> tuple[Knob, ...]:
    return tuple(_walk(section, prefix))


@functools.cache
def _sections_of(section: Any) -> Mapping[str, type[Section]]:
    hints = get_type_hints(section)
    names = (field.name for field in dataclasses.fields(section))
    return types.MappingProxyType({name: hints[name] for name in names if _is_section(hints[name])})


def _walk(section: type[Section], prefix: str) -> Iterator[Knob]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if _is_section(hint):
            yield from _walk(hint, f"{prefix}{field.name}.")
        else:
            help, limits = field.metadata[_METADATA_KEY]
            value_type, optional = _split_optional(hint)
            yield Knob(prefix + field.name, value_type, optional, field.default, help, limits)


def _limit(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_section(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _split_optional(hint: Any) -> tuple[type, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        (value_type,) = (arg for arg in get_args(hint) if arg is not type(None))
        return value_type, True
    return hint, False


def _read_str(value: object, limits: Limits) -> str:
    """Accepts integers and dates too: YAML reads unquoted 16 and 2023-08-21 as such."""
    if isinstance(value, bool) or not isinstance(value, (str, int, date)):
        raise TypeError
    text = str(value)
    if not limits.choices:
        return text
    by_lower = {choice.lower(): choice for choice in limits.choices}
    if text.lower() not in by_lower:
        raise ValueError
    return by_lower[text.lower()]


def _read_int(value: object, limits: Limits) -> int:
    if isinstance(value, str):
        return parse_bytes(value) if limits.unit == "bytes" else int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise TypeError
    return int(value)


def _read_float(value: object, limits: Limits) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def _read_bool(value: object, limits: Limits) -> bool:
    if isinstance(value, str) and value.lower() in _WORDS_FOR_BOOL:
        return _WORDS_FOR_BOOL[value.lower()]
    if not isinstance(value, bool):
        raise TypeError
    return value


_READERS: dict[type, Callable[[object, Limits], object]] = {
    str: _read_str,
    int: _read_int,
    float: _read_float,
    bool: _read_bool,
}
_TYPE_WORDS: dict[type, str] = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
