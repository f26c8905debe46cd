"""Random JSON schemas: nested objects and arrays, choices, references, bounds, patterns, open and closed objects."""

import random
from typing import Any

_WORDS = ("name", "Größe", "id", "a b", "x-y", "πλ", "list", "type", "enum", "$value", "0", 'quo"te', "back\\slash")
_PATTERNS = (r"^[A-Z]{2}-\d{3}$", r"^(red|green) [a-f]+x?$", r"^\d{4}-(0[1-9]|1[0-2])$", r"^[^\"\\]{1,3}$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
_CONSTANTS = (None, True, 17, -2.5, "", 'a"b', "世界", [1, "x"], {"k": None})


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose strings, lists and numbers have bounds, but for fractions of seconds. It begins with an object."""
    schema = _object(rng, depth)
    if rng.random() < 0.4:
        schema["$defs"] = {"shared": _any(rng, 1)}
        schema["properties"]["shared"] = {"$ref": "#/$defs/shared"}
        schema.setdefault("required", []).append("shared")
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_text, _number, _constant, lambda *_: {"type": "boolean"}, lambda *_: {"type": "null"}]
    if depth:
        kinds += [_object, _list, _choice, _object, _list]
    return rng.choice(kinds)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    schema["additionalProperties"] = False
    return schema


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema = {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        first = [_any(rng, 0) for _ in range(rng.randint(1, 2))]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": len(first)}
    return schema


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(1, 3))]}


def _constant(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"const": rng.choice(_CONSTANTS)}
    return {"enum": rng.sample(_CONSTANTS, rng.randint(1, 4))}


def _text(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.3:
        return {"type": "string", "pattern": rng.choice(_PATTERNS), "maxLength": 12}
    if kind < 0.4:
        return {"type": "string", "format": rng.choice(_FORMATS[:5])}
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 9)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-200, 200)
    if rng.random() < 0.2:
        return {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": rng.choice((2, 5, 25))}
    if rng.random() < 0.3:
        return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 50)}
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
