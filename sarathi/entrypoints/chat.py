"""`sarathi chat`: a conversation on a terminal."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from sarathi.engine.outputs import CompletionOutput
from sarathi.entrypoints.console import format_size
from sarathi.entrypoints.llm import LLM
from sarathi.entrypoints.options import config_from, sampling_from
from sarathi.sampling_params import SamplingParams

_HISTORY, _HISTORY_LINES = "~/.cache/sarathi/chat_history", 1000
_HELP = "/exit ends, /reset forgets the conversation, /system TEXT begins a new one under that system message"


def run(args: argparse.Namespace) -> int:
    """Exit code 0 at /exit or the end of input."""
    params, config = sampling_from(args), config_from(args)  # refused here, before the model is loaded
    with LLM.from_config(config) as llm:
        conversation = Conversation(llm, params, args.system)
        print(f"{llm!r}\n{_HELP}")
        with _editing():
            for line in _lines():
                if line == "/exit":
                    break
                conversation.hear(line)
    return 0


class Conversation:
    """The messages so far. Answers are printed as they come."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
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
            print(_HELP)
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
        start_s, answer = time.monotonic(), None
        try:
            for output in self._llm.stream(self._llm.encode_chat(self._messages), self._params):
                answer = output.outputs[0]
                print(answer.delta, end="", flush=True)
        except KeyboardInterrupt:
            print(" [interrupted]", end="")
        print(f"\n{self._measured(answer, time.monotonic() - start_s)}")
        return answer.text if answer else ""

    def _measured(self, answer: CompletionOutput | None, elapsed_s: float) -> str:
        num_tokens = answer.num_tokens if answer else 0
        mapped = format_size(self._llm.memory_stats().mapped_bytes)
        return f"[{num_tokens} tokens, {num_tokens / elapsed_s:.1f} tokens/s, {mapped} of KV cache mapped]"


@contextlib.contextmanager
def _editing() -> Iterator[None]:
    """Arrow keys edit the line and bring back those of earlier chats, where Python has readline and a person types."""
    try:
        import readline
    except ImportError:
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    history = Path(_HISTORY).expanduser()
    readline.set_history_length(_HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def _lines() -> Iterator[str]:
    """Lines of input, after a prompt where a person is typing."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "").strip()
