"""The core process itself: started by `client.py`, it builds a core, serves it, and ends with its parent.

It is a fresh interpreter and not a fork or a child of multiprocessing: CUDA survives no fork, and multiprocessing would
run the caller's script a second time.
"""

import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from sarathi.engine.core_process.loop import CoreLoop
from sarathi.engine.core_process.wire import Command, Heartbeat, Report, StartFailed, decode_command, encode

if TYPE_CHECKING:
    from sarathi.engine.core import EngineCore

MakeCore = Callable[[], "EngineCore"]
COMMANDS, REPORTS = "commands", "reports"  # sockets in the folder
HEARTBEAT_S = 0.5
FAILED = 1


def main() -> None:
    """Arguments: the sockets' folder and the parent's process id. Input: the pickled function that makes a core."""
    folder, parent_id = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager signals all processes: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watcher = threading.Thread(target=_beat_until_orphaned, args=(folder, parent_id), daemon=True)
    watcher.start()
    channel = _ZmqChannel(folder)
    try:
        _serve(channel)
    finally:
        channel.close()


def _serve(channel: "_ZmqChannel") -> None:
    try:
        make_core: MakeCore = pickle.load(sys.stdin.buffer)
        core = make_core()
    except Exception as error:
        is_user_error = isinstance(error, (ValueError, ImportError, OSError))
        channel.send(StartFailed(str(error) if is_user_error else f"{type(error).__name__}: {error}", is_user_error))
        if is_user_error:
            sys.exit(FAILED)
        raise
    try:
        CoreLoop(core, channel).run()
    finally:
        core.shutdown()


def _beat_until_orphaned(folder: Path, parent_id: int) -> None:
    """A sign of life every half second; ends the process when its parent is gone."""
    socket = _connect(zmq.Context(), zmq.PUSH, folder / REPORTS)
    beat, wait = encode(Heartbeat()), threading.Event().wait
    while os.getppid() == parent_id:
        socket.send(beat)
        wait(HEARTBEAT_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(FAILED)


class _ZmqChannel:
    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self._inbox = _connect(self._context, zmq.PULL, folder / COMMANDS)
        self._outbox = _connect(self._context, zmq.PUSH, folder / REPORTS)

    def receive(self, wait: bool) -> Sequence[Command]:
        commands = [decode_command(self._inbox.recv())] if wait else []
        while self._inbox.poll(0):
            commands.append(decode_command(self._inbox.recv()))
        return commands

    def send(self, report: Report) -> None:
        self._outbox.send(encode(report))

    def close(self) -> None:
        """Wait a second for the client to take what was sent."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=1000)
        self._context.term()


def _connect(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, path: Path) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.connect(f"ipc://{path}")
    return socket


if __name__ == "__main__":
    main()
