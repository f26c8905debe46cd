"""Builds a configuration of a given schema from a YAML file, overrides and keywords.

A knob is named by its path (scheduler.chunk_size), by the path with underscores (scheduler_chunk_size), or by its last
part (chunk_size) if that is unique.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sarathi.config.knobs import ConfigError, Knob, Section, knobs_of, sections_of
from sarathi.config.schema import EngineConfig
from sarathi.config.vllm_names import VLLM_NAMES
from sarathi.wording import short_repr

S = TypeVar("S", bound=Section)
_NEAR = 0.75  # similarity from which a name counts as misspelled
_MOST_CHARACTERS = _MOST_VALUES = 1_000_000  # of a YAML file, and after its aliases are expanded


def make_config(**settings: object) -> EngineConfig:
    """An EngineConfig from keywords: make_config(chunk_size=64, model="yi-6b-200k"); ConfigError if one is unknown."""
    return load_config(EngineConfig, overrides=settings)


def load_config(schema: type[S], path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> S:
    """A `schema` from a YAML file of its sections; overrides take precedence.

    Values may be typed or text ("512", "none"); choices are case-insensitive. Raises ConfigError, which names the knob,
    or for an unknown one the nearest known name.
    """
    settings = dict(_flatten(_read_sections(path), schema)) if path is not None else {}
    settings.update(overrides or {})
    by_path = {each.path: each for each in knobs_of(schema)}
    values = {}
    for name, value in settings.items():
        found = find_knob(schema, name)
        values[found.path] = by_path[found.path].coerce(value)
    return _build(schema, values, "")


def find_knob(schema: type[Section], name: str) -> Knob:
    """Find a knob by its path, its flat name, its last two parts, or a unique last part.

    Raises ConfigError with the nearest known name, or the counterpart of a vLLM setting.
    """
    if not isinstance(name, str):  # a YAML key may be of any type
        raise ConfigError(f"unknown setting {short_repr(name)}: a setting's name is text")
    knobs = knobs_of(schema)
    wanted = name.strip().lower().replace("-", "_")
    for form in ("path", "flat", "tail", "leaf"):
        found = [each for each in knobs if getattr(each, form) == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{name!r} could mean {' or '.join(each.path for each in found)}: write the whole path")
    raise ConfigError(f"unknown setting {short_repr(name)}{_hint(wanted, knobs)}")


def _hint(wanted: str, knobs: tuple[Knob, ...]) -> str:
    """What to write instead: the counterpart of a vLLM setting, or a similar name if there is one."""
    if wanted in VLLM_NAMES:
        return f": of vLLM's settings, it is {VLLM_NAMES[wanted]}"
    nearest = _nearest_path(wanted, knobs)
    return f"; the nearest known is {nearest!r}" if nearest else "; no known setting has a similar name"


def to_dict(config: Section) -> dict[str, Any]:
    """The configuration as nested dicts of plain values; load_config reads it back."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: object) -> object:
    if isinstance(value, Section):
        return to_dict(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _nearest_path(wanted: str, knobs: tuple[Knob, ...]) -> str | None:
    """A dotted name is compared with whole paths, any other with last parts and section names."""
    if "." in wanted:
        return next(iter(get_close_matches(wanted, [each.path for each in knobs], 1, _NEAR)), None)
    sections = {section: section for each in knobs if (section := each.path.rpartition(".")[0])}
    by_name = sections | {each.flat: each.path for each in knobs} | {each.leaf: each.path for each in knobs}
    return next((by_name[name] for name in get_close_matches(wanted, by_name, 1, _NEAR)), None)


class _BoundedLoader(yaml.SafeLoader):
    """Safe YAML loader of bounded size: nested anchors can expand a kilobyte to billions of values."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _num_values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values")
        return node


def _num_values(node: Any, known: dict[int, int]) -> int:
    """Values of a node after its aliases are expanded; more than _MOST_VALUES for a node that contains itself."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1
        children = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = () if isinstance(node, yaml.ScalarNode) else children
        known[id(node)] = 1 + sum(_num_values(each, known) for each in inner)
    return known[id(node)]


def read_yaml(path: str | Path) -> object:
    """The content of a YAML file, of at most a million characters; ConfigError that names the file."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"it has more than {_MOST_CHARACTERS} characters")
        return yaml.load(text, _BoundedLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or integer out of range
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from None


def _read_sections(path: str | Path) -> Mapping[str, object]:
    content = read_yaml(path)
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(f"{str(path)!r} holds {type(content).__name__}; it must hold sections such as `scheduler:`")
    return content or {}


def _flatten(tree: Mapping[str, object], schema: type[Section], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of nested sections; a key that is not a section is left to find_knob."""
    sections = sections_of(schema)
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in sections:
            yield path, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, sections[name], f"{path}.")
        elif value is not None:
            raise ConfigError(
                f"{path} is {short_repr(value)}: it is a section and holds {', '.join(_names(sections[name]))}"
            )


def _names(section: type[Section]) -> list[str]:
    return [each.path for each in knobs_of(section)]


def _build(schema: type[S], values: Mapping[str, object], prefix: str) -> S:
    inner: dict[str, Any] = {
        name: _build(section, values, f"{prefix}{name}.") for name, section in sections_of(schema).items()
    }
    own = {name: values[prefix + name] for name in _names(schema) if "." not in name and prefix + name in values}
    return schema(**inner, **own)
