"""What an answer consists of. Parsers give parts as the text grows; joined, they do not depend on how it was cut."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """Text of the answer itself."""

    text: str


class Reasoning(NamedTuple):
    """Text that the model thinks before it answers."""

    text: str


class CallBegin(NamedTuple):
    """A call of a tool; calls of an answer are numbered from 0."""

    call: int
    name: str


class CallArguments(NamedTuple):
    """More of the arguments of a call, which are JSON text."""

    call: int
    text: str


Part = Text | Reasoning | CallBegin | CallArguments


class ToolParser(Protocol):
    """Finds tool calls in the text of one answer."""

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after this text."""

    def flush(self, is_cut: bool) -> list[Part]:
        """The rest, when no more text comes. is_cut: the answer did not end by itself, so markup may be incomplete."""


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind as one part, without empty ones."""
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
    """A whole answer."""

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
