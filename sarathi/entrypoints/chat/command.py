"""The command: opens the model, reads lines, keeps the line history of earlier chats."""

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
    """Returns exit code 0 at /exit or the end of input."""
    with _open_model(args) as model:
        conversation = Conversation(model, args.system)
        print(f"{model}\n{HELP}")
        with _editing():
            for line in _lines():
                if line == "/exit":
                    break
                conversation.handle_line(line)
    return 0


def _open_model(args: argparse.Namespace) -> contextlib.AbstractContextManager[ChatModel]:
    """Checks options before loading a model. ValueError if one needs --url or excludes it."""
    params = sampling_from(args)
    if args.url is None:
        from sarathi.entrypoints.chat.local import open_local_model  # loads the engine

        if args.api_key_file is not None:
            raise ValueError("api_key_file needs --url")
        return open_local_model(config_from(args), params)

    from sarathi.entrypoints.chat.remote import Server, open_remote_model, read_api_key

    config = given_config(args)
    if others := [name for name in config if name != _MODEL]:
        raise ValueError(f"{', '.join(others)}: options of an engine in this process cannot be combined with --url")
    return open_remote_model(
        Server(args.url, read_api_key(args.api_key_file)), config.get(_MODEL), given_sampling(args)
    )


@contextlib.contextmanager
def _editing() -> Iterator[None]:
    """Enable line editing and history on a terminal, if Python has readline."""
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
    """Lines of input; shows a prompt on a terminal."""
    with contextlib.suppress(EOFError):
        while True:
            yield input("> " if sys.stdin.isatty() else "").strip()
