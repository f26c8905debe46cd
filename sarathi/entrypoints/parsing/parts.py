"""Parts of an answer. Parsers stream them; joined, they do not depend on how the text was split."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """Content of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Reasoning text before the answer."""

    text: str


class CallBegin(NamedTuple):
    """Start of a tool call. Calls of an answer are numbered from 0."""

    call: int
    name: str


class CallArguments(NamedTuple):
    """The next part of a call's arguments, as JSON text."""

    call: int
    text: str


Part = Text | Reasoning | CallBegin | CallArguments


class ToolParser(Protocol):
    """Incremental parser of the tool calls in one answer."""

    def push(self, text: str) -> list[Part]:
        """The parts that this text completes."""

    def flush(self, is_cut: bool) -> list[Part]:
        """The remaining parts at the end. is_cut: the answer was cut off, so markup may be incomplete."""


def joined(parts: Iterable[Part]) -> list[Part]:
    """Merge adjacent parts of the same kind and drop empty ones."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, CallBegin):
            merged.append(part)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and last.call == part.call:
            merged[-1] = CallArguments(part.call, last.text + part.text)
        elif isinstance(part, (Text, Reasoning)) and type(last) is type(part):
            merged[-1] = type(part)(last.text + part.text)
        elif part.text:
            merged.append(part)
    return merged


@dataclass
class ToolCall:
    name: str
    arguments: str = ""


@dataclass
class Answer:
    """A complete answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if isinstance(part, Text):
                self.content += part.text
            elif isinstance(part, Reasoning):
                self.reasoning += part.text
            elif isinstance(part, CallBegin):
                self.calls.append(ToolCall(part.name))
            else:
                self.calls[part.call].arguments += part.text
