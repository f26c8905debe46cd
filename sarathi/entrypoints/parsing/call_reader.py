"""One tool call as JSON, `{"name": ..., "arguments": {...}}`, parsed character by character."""

import json
from collections.abc import Callable
from enum import Enum

_SPACE = " \t\r\n"
ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("type", "id")


class Status(Enum):
    """FAILED: the text is not a tool call."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


class CallReader:
    """Provides the name once it is complete, and then the arguments as they arrive.

    Tracks only braces and strings and does not validate the arguments. Arguments that are a JSON string are decoded.
    raw: all characters so far.
    """

    def __init__(self) -> None:
        self.status = Status.OPEN
        self.name: str | None = None
        self.raw = ""
        self.has_begun = False  # the name is known, and the arguments have started or the call has ended
        self._pending = ""  # arguments not taken yet
        self._state: Callable[[str], None] = self._before
        self._key = ""
        self._value = ""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._has_arguments = False

    def push(self, char: str) -> None:
        """Feed the next character. The status must be OPEN."""
        self.raw += char
        self._state(char)

    def take_arguments(self) -> str:
        """The arguments since the last call of this method; empty before `has_begun`."""
        if not self.has_begun:
            return ""
        taken, self._pending = self._pending, ""
        return taken

    @property
    def is_between_members(self) -> bool:
        return self._state == self._member

    def _before(self, char: str) -> None:
        if char == "{":
            self._state = self._member
        elif char not in _SPACE:
            self._fail()

    def _member(self, char: str) -> None:
        if char == '"':
            self._value, self._state = char, self._in_key
        elif char == "}":
            self._finish()
        elif char not in _SPACE and char != ",":
            self._fail()

    def _in_key(self, char: str) -> None:
        self._value += char
        if self._ends_string(char):
            self._key = _string(self._value)
            is_known = self._key in (*ARGUMENTS, *_OTHERS, "name")
            self._state = self._colon
            if not is_known:
                self._fail()

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._value_start
        elif char not in _SPACE:
            self._fail()

    def _value_start(self, char: str) -> None:
        if char in _SPACE:
            return
        self._value, self._depth, self._state = "", 0, self._in_value
        self._has_arguments |= self._key in ARGUMENTS
        self._in_value(char)

    def _in_value(self, char: str) -> None:
        if self._in_string:
            self._keep(char)
            if self._ends_string(char):
                self._in_string = False
                self._end_value_at_top()
        elif char in "}]," + _SPACE and self._depth == 0:
            self._end_value()
            self._member(char)
        else:
            self._keep(char)
            self._in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if char in "}]":
                self._end_value_at_top()

    def _keep(self, char: str) -> None:
        self._value += char
        if self._key in ARGUMENTS and self._value[0] != '"':
            self._pending += char
            self.has_begun |= self.name is not None

    def _end_value_at_top(self) -> None:
        if self._depth == 0:
            self._end_value()

    def _end_value(self) -> None:
        self._state = self._member
        if self._key == "name" and self._value[:1] != '"':
            self._fail()
        elif self._key == "name":
            self.name = self.name or _string(self._value)
            self.has_begun |= self._has_arguments
        elif self._key in ARGUMENTS and self._value[:1] == '"':
            self._pending += _string(self._value)
            self.has_begun |= self.name is not None

    def _ends_string(self, char: str) -> bool:
        """Whether this character is the closing quote of the current string."""
        is_end = char == '"' and not self._is_escaped
        self._is_escaped = char == "\\" and not self._is_escaped
        return is_end

    def _finish(self) -> None:
        if self.name is None:
            self._fail()
            return
        self._pending += "" if self._has_arguments else "{}"
        self.status, self.has_begun = Status.DONE, True

    def _fail(self) -> None:
        self.status = Status.FAILED


def _string(quoted: str) -> str:
    """The value of a JSON string; the text itself if it is not valid JSON."""
    try:
        text = str(json.loads(quoted, strict=False))
    except ValueError:
        text = quoted[1:-1]
    return text.encode("utf-8", "replace").decode()  # without lone surrogates
