"""A conversation with a local or remote model."""

import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

HELP = "/exit ends, /reset clears the conversation, /system TEXT starts a new one with that system message"

Messages = Sequence[Mapping[str, str]]


class Piece(NamedTuple):
    """New text of an answer. num_tokens: of the answer so far. is_reasoning: printed, but not part of the answer."""

    text: str
    num_tokens: int
    is_reasoning: bool = False


class ChatModel(Protocol):
    """A model that answers messages. str() describes it."""

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """Stream the answer; closing the generator aborts it. ValueError if the messages are refused."""

    def memory(self) -> str:
        """Memory use, for the status line after an answer; "" if unknown."""


class Conversation:
    """The messages so far. Prints answers as they arrive."""

    def __init__(self, model: ChatModel, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._reset()

    def handle_line(self, line: str) -> None:
        """Run a command or answer a message. A refused message is removed from the conversation."""
        if line == "/reset":
            self._reset()
        elif line.startswith("/system"):
            self._system = line.removeprefix("/system").strip() or None
            self._reset()
        elif line.startswith("/"):
            print(HELP)
        elif line:
            self._try_answer(line)

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _try_answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        try:
            text = self._answer()
        except ValueError as error:
            self._messages.pop()
            print(f"{error}\n(the message was dropped; /reset makes room)", file=sys.stderr)
        else:
            self._messages.append({"role": "assistant", "content": text})

    def _answer(self) -> str:
        start_s, text, num_tokens = time.monotonic(), "", 0
        try:
            with closing(self._model.answer(self._messages)) as pieces:
                for piece in pieces:
                    print(piece.text, end="", flush=True)
                    text += "" if piece.is_reasoning else piece.text
                    num_tokens = piece.num_tokens
        except KeyboardInterrupt:
            print(" [interrupted]", end="")
        rate = num_tokens / (time.monotonic() - start_s)
        print(f"\n[{num_tokens} tokens, {rate:.1f} tokens/s{self._model.memory()}]")
        return text
