"""Tool call parsers of the model families. Markup never appears in the content, even if it is cut off.

A parser is a state machine. A state consumes text, adds parts, and returns the remaining text for the next state.
"""

import json
from collections.abc import Callable

from sarathi.entrypoints.parsing.call_reader import CallReader, Status
from sarathi.entrypoints.parsing.markup import TextUntil
from sarathi.entrypoints.parsing.parts import CallArguments, CallBegin, Part, Text, joined


class _CallParser:
    """Base class: content, and calls that a CallReader parses."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._num_calls = 0
        self._reader = CallReader()
        self._has_told = False  # whether CallBegin of the current call was emitted
        self._state: Callable[[str], str] = self._plain
        self._until = TextUntil("\0")

    def push(self, text: str) -> list[Part]:
        """See ToolParser."""
        while text:
            text = self._state(text)
        return self._taken()

    def flush(self, is_cut: bool) -> list[Part]:
        """See ToolParser."""
        self._end(is_cut)
        return self._taken()

    def _end(self, is_cut: bool) -> None:
        """Emit the text that is held back."""
        raise NotImplementedError

    def _call_done(self) -> None:
        """Set the next state."""
        raise NotImplementedError

    def _call_failed(self) -> str:
        """Set the next state after text that is not a call; returns that text if it is content."""
        raise NotImplementedError

    def _taken(self) -> list[Part]:
        parts, self._parts = joined(self._parts), []
        return parts

    def _say(self, text: str) -> None:
        self._parts.append(Text(text))

    def _plain(self, text: str) -> str:
        """The rest of the answer is content."""
        self._say(text)
        return ""

    def _begin_call(self, given: str = "") -> None:
        """given: start of the call's JSON object, if the format writes it differently."""
        self._reader, self._has_told, self._state = CallReader(), False, self._call
        for char in given:
            self._reader.push(char)

    def _call(self, text: str) -> str:
        reader, used = self._reader, 0
        while used < len(text) and reader.status is Status.OPEN:
            reader.push(text[used])
            used += 1
            self._after_character()
        self._tell()
        rest = text[used:]
        if reader.status is Status.DONE:
            self._call_done()
        elif reader.status is Status.FAILED:
            return self._call_failed() + rest
        return rest

    def _after_character(self) -> None:
        """Hook for formats in which a call does not end with its object."""

    def _tell(self) -> None:
        if self._reader.has_begun and not self._has_told:
            self._has_told = True
            self._parts.append(CallBegin(self._num_calls, str(self._reader.name)))
            self._num_calls += 1
        self._parts.append(CallArguments(self._num_calls - 1, self._reader.take_arguments()))


class HermesParser(_CallParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times, between text: Hermes, Qwen."""

    def __init__(self) -> None:
        super().__init__()
        self._is_gap = False  # between a call and the following text
        self._await_call()

    def _end(self, is_cut: bool) -> None:
        if self._state in (self._content, self._no_call):
            self._say(self._until.flush(is_cut))

    def _await_call(self) -> None:
        self._until, self._state = TextUntil("<tool_call>"), self._content

    def _content(self, text: str) -> str:
        text = text.lstrip() if self._is_gap else text
        self._is_gap &= not text
        released, rest = self._until.push(text)
        self._say(released)
        if rest is None:
            return ""
        self._begin_call()
        return rest

    def _call_done(self) -> None:
        self._until, self._state = TextUntil("</tool_call>"), self._tail

    def _call_failed(self) -> str:
        self._call_done()
        if self._has_told:
            return ""
        self._state = self._no_call
        return self._reader.raw

    def _tail(self, text: str) -> str:
        """Ignores text between a call's object and its closing tag."""
        _, rest = self._until.push(text)
        self._is_gap = rest is not None
        return self._close(rest)

    def _no_call(self, text: str) -> str:
        """Text between the tags that is not a call is content."""
        released, rest = self._until.push(text)
        self._say(released)
        return self._close(rest)

    def _close(self, rest: str | None) -> str:
        if rest is None:
            return ""
        self._await_call()
        return rest


class MistralParser(_CallParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` for each call."""

    _TAG = "[TOOL_CALLS]"

    def __init__(self) -> None:
        super().__init__()
        self._name = ""
        self._is_named = False  # the current call has the form name[ARGS]{...}
        self._await_call()

    def _end(self, is_cut: bool) -> None:
        if self._state == self._content:
            self._say(self._until.flush(is_cut))

    def _await_call(self) -> None:
        self._until, self._state = TextUntil(self._TAG), self._content

    def _content(self, text: str) -> str:
        released, rest = self._until.push(text)
        self._say(released)
        if rest is None:
            return ""
        self._name, self._state = "", self._opening
        return rest

    def _opening(self, text: str) -> str:
        text = text.lstrip()
        if not text:
            return ""
        if text[0] == "[":
            self._state = self._between
            return text[1:]
        self._state = self._named
        return text

    def _between(self, text: str) -> str:
        """Between the calls of a list."""
        text = text.lstrip(" \t\r\n,")
        if text[:1] == "]":
            self._state = self._gap
            return text[1:]
        if text:
            self._is_named = False
            self._begin_call()
        return text

    def _gap(self, text: str) -> str:
        text = text.lstrip()
        if text:
            self._await_call()
        return text

    def _named(self, text: str) -> str:
        name, brace, _ = text.partition("{")
        self._name += name
        if not brace:
            return ""
        self._is_named = bool(self._name.strip())
        plain_name = self._name.partition("[")[0].strip()
        self._begin_call(f'{{"name": {json.dumps(plain_name)}, "arguments": ' if self._is_named else "")
        return text[len(name) :]

    def _after_character(self) -> None:
        if self._is_named and self._reader.status is Status.OPEN and self._reader.is_between_members:
            self._reader.push("}")

    def _call_done(self) -> None:
        self._state = self._gap if self._is_named else self._between

    def _call_failed(self) -> str:
        self._state = self._plain
        return "" if self._has_told or self._is_named else self._reader.raw


class LlamaParser(_CallParser):
    """`{"name": ..., "parameters": {...}}` as the whole answer, several separated by semicolons: Llama 3.1 and later.

    An object with other members is content.
    """

    _TAG = "<|python_tag|>"

    def __init__(self) -> None:
        super().__init__()
        self._lead = ""
        self._state = self._opening

    def _end(self, is_cut: bool) -> None:
        if self._state == self._opening and not (is_cut and self._lead.strip()):
            self._say(self._lead)
        elif self._state == self._call and not self._has_told and not is_cut:
            self._say(self._lead + self._reader.raw)

    def _opening(self, text: str) -> str:
        """Before the first character, which decides between calls and content."""
        self._lead += text
        seen = self._lead.lstrip()
        if self._TAG.startswith(seen):
            return ""
        rest = seen.removeprefix(self._TAG).lstrip()
        if rest[:1] == "{":
            self._lead = self._lead[: len(self._lead) - len(seen)]
            self._begin_call()
            return rest
        if rest:
            self._state = self._plain
            self._say(self._lead.replace(self._TAG, "", 1) if seen.startswith(self._TAG) else self._lead)
            self._lead = ""
        return ""

    def _between(self, text: str) -> str:
        text = text.lstrip(" \t\r\n;,")
        if not text:
            return ""
        self._lead = ""
        if text[0] == "{":
            self._begin_call()
        else:
            self._state = self._plain
        return text

    def _call_done(self) -> None:
        self._state = self._between

    def _call_failed(self) -> str:
        self._state = self._plain
        return "" if self._has_told else self._lead + self._reader.raw
