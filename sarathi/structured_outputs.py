"""What the text of an output must look like: a JSON schema, a regular expression, a choice or a grammar.

llguidance compiles and checks it; it is imported when there is something to check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sarathi.wording import short_repr

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_ANY_OBJECT = '{"type":"object"}'
JSON_WHITESPACE = r"\x20{1,40}|\r?\n(\x20{0,40}|\t{0,10})"
"""Between two JSON tokens: a line break and an indentation. A small model would write whitespace without end."""


@dataclass(frozen=True)
class StructuredOutputsParams:
    """One limit on the text of an output, by the names that users of vLLM know; checked when built.

    json: a JSON schema, as a dict or as JSON text. The properties of an object come in the schema's order.
    regex: a regular expression that the whole output matches, in the syntax of Rust's regex crate.
    choice: strings of which the output is one.
    grammar: a context-free grammar in the Lark syntax of llguidance, or in GBNF. `start` (`root`) is the output.
    json_object: true for any JSON object.
    disable_any_whitespace: JSON without whitespace between its tokens; otherwise see JSON_WHITESPACE.

    Raises ValueError unless exactly one of the first five is given, and where it is malformed; `check_grammar` says
    whether llguidance can follow it.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ValueError(f"{name} is {short_repr(getattr(self, name))}: it must be true or false")
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs has {' and '.join(given) or 'no limit'}: it must have exactly one of "
                f"{', '.join(_KINDS)}"
            )
        self._check_texts()

    @classmethod
    def of(cls, value: object) -> StructuredOutputsParams | None:
        """The limit that a caller gave, also as a mapping of the fields' names."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"structured_outputs is {short_repr(value)}: it must be a StructuredOutputsParams")
        names = [field.name for field in fields(cls)]
        for name in value:
            if name not in names:
                raise ValueError(f"structured_outputs holds {short_repr(name)}: it may hold {', '.join(names)}")
        return cls(**value)

    def llguidance_grammar(self) -> str:
        """The limit in llguidance's own form. ValueError where a GBNF grammar cannot be read."""
        llguidance = _llguidance()
        if self.regex is not None:
            return str(llguidance.LLMatcher.grammar_from_regex(self.regex))
        if self.grammar is not None:
            return str(llguidance.grammar_from("grammar", self.grammar))
        if self.choice is not None:
            options = " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice)
            return str(llguidance.LLMatcher.grammar_from_lark(f"start: {options}"))
        spaces: dict[str, Any] = {"whitespace_pattern": JSON_WHITESPACE}
        if self.disable_any_whitespace:
            spaces = {"whitespace_flexible": False}
        schema = str(self.json) if self.json is not None else _ANY_OBJECT
        return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=spaces))

    def _check_texts(self) -> None:
        if self.json is not None:
            object.__setattr__(self, "json", _json_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choice(self.choice))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise ValueError(f"{name} is {short_repr(text)}: it must be a string of one character or more")


def check_grammar(params: StructuredOutputsParams, vocabulary: Any = None) -> None:
    """ValueError with llguidance's reason where it cannot follow the limit.

    vocabulary: an LLTokenizer, for special tokens that a grammar names; None: their names are not checked.
    """
    kind = next(name for name in _KINDS if getattr(params, name))
    reason = _llguidance().LLMatcher.validate_grammar(params.llguidance_grammar(), vocabulary)
    if reason and not reason.startswith("WARNING"):
        raise ValueError(f"structured_outputs.{kind} is {short_repr(getattr(params, kind))}: {reason.strip()}")


def _json_text(schema: object) -> str:
    """The schema as JSON text."""
    try:
        read = json.loads(schema) if isinstance(schema, (str, bytes)) else schema
        if isinstance(read, Mapping):
            return json.dumps(read, default=dict)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json is {short_repr(schema)}: it is no JSON ({error})") from None
    raise ValueError(f"json is {short_repr(schema)}: it must be a JSON schema, an object")


def _choice(value: object) -> tuple[str, ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"choice is {short_repr(value)}: it must be a list of one string or more")
    for text in value:
        if not isinstance(text, str) or not text:
            raise ValueError(f"choice holds {short_repr(text)}: each entry must be a string of one character or more")
    return tuple(value)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "structured_outputs needs the package llguidance: pip install 'sarathi-vattention[server]'"
        ) from None
    return llguidance
