"""Signals that end a benchmark, and locks on result folders."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block ^C raises KeyboardInterrupt, and so does the first SIGTERM or SIGHUP; later ones are ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled([signal.SIGINT], signal.default_int_handler), _handled(ENDING, end):
        yield


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Within the block ^C, SIGTERM and SIGHUP set `stop`; a second ^C raises KeyboardInterrupt. For measuring."""
    note = _setter_of(stop)

    def note_once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler)
        note(number, frame)

    with _handled(ENDING, note), _handled([signal.SIGINT], note_once):
        yield


@contextmanager
def held_signals(stop: threading.Event) -> Iterator[None]:
    """Within the block ^C, SIGTERM and SIGHUP set `stop` and raise nothing. For writing files."""
    with _handled((signal.SIGINT, *ENDING), _setter_of(stop)):
        yield


def _setter_of(stop: threading.Event) -> Handler:
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        is_first = not noted
        noted.append(number)
        if is_first:  # Event.set holds a lock: a signal that comes during it must not call it
            stop.set()

    return note


@contextmanager
def _handled(numbers: Iterable[signal.Signals], handle: Handler) -> Iterator[None]:
    """Within the block these signals call `handle`. Ignored signals stay ignored; in another thread than the main one
    nothing changes, for Python handles signals in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, handle) for number in taken}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Only one process at a time is in this block for any of the folders, which are created. ValueError names a folder
    that another process is in."""
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{folder} is in use: another process writes its results there") from None
        yield
