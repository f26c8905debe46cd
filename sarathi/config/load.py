"""Configuration from a YAML file, overrides and keywords. Knows no particular section: the schema is handed in.

A knob is named by its path (scheduler.chunk_size), by the path in one word (scheduler_chunk_size), or by its last part
where only one knob ends so (chunk_size).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sarathi.config.knobs import ConfigError, Knob, Section, knobs_of, sections_of
from sarathi.config.schema import EngineConfig
from sarathi.config.units import nearest

S = TypeVar("S", bound=Section)


def make_config(**settings: object) -> EngineConfig:
    """An EngineConfig from keywords: make_config(chunk_size=64, model="yi-6b-200k"); ConfigError if one is unknown."""
    return load_config(EngineConfig, overrides=settings)


def load_config(schema: type[S], path: str | Path | None = None, overrides: Mapping[str, object] | None = None) -> S:
    """A `schema` from a YAML file of its sections, and overrides that win over it.

    Values may be typed or text ("512", "none"); names of choices may be in any case. Raises ConfigError that names the
    knob, and the nearest known one where it does not exist.
    """
    settings = dict(_flatten(_read_yaml(path), schema)) if path is not None else {}
    settings.update(overrides or {})
    by_path = {each.path: each for each in knobs_of(schema)}
    values = {}
    for name, value in settings.items():
        found = find_knob(schema, name)
        values[found.path] = by_path[found.path].coerce(value)
    return _build(schema, values, "")


def find_knob(schema: type[Section], name: str) -> Knob:
    """The knob that a path, a flat name or a unique last part means; ConfigError names the nearest otherwise."""
    knobs = knobs_of(schema)
    wanted = name.strip().lower().replace("-", "_")
    for form in ("path", "flat", "leaf"):
        found = [each for each in knobs if getattr(each, form) == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{name!r} could mean {' or '.join(each.path for each in found)}: write the whole path")
    raise ConfigError(f"unknown setting {name!r}; the nearest known is {_nearest_path(wanted, knobs)!r}")


def to_dict(config: Section) -> dict[str, Any]:
    """The configuration as plain nested dicts: what a result saves, and load_config reads back."""
    return asdict(config)


def _nearest_path(wanted: str, knobs: tuple[Knob, ...]) -> str:
    """Compare like with like: whole paths with a dotted name, last parts with a bare one."""
    if "." in wanted:
        return nearest(wanted, [each.path for each in knobs])
    by_name = {each.flat: each.path for each in knobs} | {each.leaf: each.path for each in knobs}
    return by_name[nearest(wanted, by_name)]


def _read_yaml(path: str | Path) -> Mapping[str, object]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from None
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(f"{str(path)!r} holds {type(content).__name__}; it must hold sections, as `scheduler:`")
    return content or {}


def _flatten(tree: Mapping[str, object], schema: type[Section], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of nested sections; what is no section is left for find_knob to judge."""
    sections = sections_of(schema)
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in sections:
            yield path, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, sections[name], f"{path}.")
        elif value is not None:
            raise ConfigError(f"{path} is {value!r}: it is a section and holds {', '.join(_names(sections[name]))}")


def _names(section: type[Section]) -> list[str]:
    return [each.path for each in knobs_of(section)]


def _build(schema: type[S], values: Mapping[str, object], prefix: str) -> S:
    inner: dict[str, Any] = {
        name: _build(section, values, f"{prefix}{name}.") for name, section in sections_of(schema).items()
    }
    own = {name: values[prefix + name] for name in _names(schema) if "." not in name and prefix + name in values}
    return schema(**inner, **own)
