"""A conversation with a model, wherever the model runs."""

import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

HELP = "/exit ends, /reset forgets the conversation, /system TEXT begins a new one under that system message"

Messages = Sequence[Mapping[str, str]]


class Piece(NamedTuple):
    """What an answer grew by. num_tokens: of the answer so far. is_reasoning: shown, and not part of the answer."""

    text: str
    num_tokens: int
    is_reasoning: bool = False


class ChatModel(Protocol):
    """Answers messages. As text it says what it is."""

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """The answer as it grows; closing the generator aborts it. ValueError where the messages are refused."""

    def memory(self) -> str:
        """What the line behind an answer says of the model's memory; "" where it is not known."""


class Conversation:
    """The messages so far. Answers are printed as they come."""

    def __init__(self, model: ChatModel, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._reset()

    def hear(self, line: str) -> None:
        """Run a command, or answer. A refused message is dropped from the conversation."""
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
