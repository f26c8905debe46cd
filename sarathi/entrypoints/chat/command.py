"""The command: a model, the lines that a person types, and what was typed in earlier chats."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from sarathi.entrypoints.chat.conversation import HELP, ChatModel, Conversation
from sarathi.entrypoints.options import config_from, given_config, given_sampling, sampling_from

_HISTORY, _HISTORY_LINES = "~/.cache/sarathi/chat_history", 1000
_MODEL = "model.model"


def run(args: argparse.Namespace) -> int:
    """Exit code 0 at /exit or the end of input."""
    with _open_model(args) as model:
        conversation = Conversation(model, args.system)
        print(f"{model}\n{HELP}")
        with _editing():
            for line in _lines():
                if line == "/exit":
                    break
                conversation.hear(line)
    return 0


def _open_model(args: argparse.Namespace) -> contextlib.AbstractContextManager[ChatModel]:
    """Options are checked before a model is loaded. ValueError where one has no meaning beside --url, or without."""
    params = sampling_from(args)
    if args.url is None:
        from sarathi.entrypoints.chat.local import open_local_model  # loads the engine

        if args.api_key_file is not None:
            raise ValueError("api_key_file is for a server: it needs --url")
        return open_local_model(config_from(args), params)

    from sarathi.entrypoints.chat.remote import Server, open_remote_model, read_api_key

    config = given_config(args)
    if others := [name for name in config if name != _MODEL]:
        raise ValueError(f"{', '.join(others)}: options of an engine in this process; --url names one that runs")
    return open_remote_model(
        Server(args.url, read_api_key(args.api_key_file)), config.get(_MODEL), given_sampling(args)
    )


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
