"""The core process: started by `client.py`, it builds and serves a core, and ends with its parent.

It is a new interpreter, neither a fork nor a multiprocessing child: CUDA does not survive a fork, and multiprocessing
would run the caller's script again.
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
from sarathi.engine.core_process.owners import MAIN
from sarathi.engine.core_process.wire import Command, Heartbeat, Report, StartFailed, decode_command, encode
from sarathi.parent_death import continue_without_parent

if TYPE_CHECKING:
    from sarathi.engine.core import EngineCore

MakeCore = Callable[[], "EngineCore"]
COMMANDS, REPORTS = "commands", "reports"  # file names of the sockets that the parent binds
SHARED_COMMANDS, SHARED_REPORTS = "shared-commands", "shared-reports"  # those that the core binds, for other front ends
HEARTBEAT_S = 0.5
FAILED = 1


def main() -> None:
    """Arguments: the sockets' folder and the parent's process id. Input: the pickled function that makes a core."""
    folder, parent_id = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # service managers signal all processes; only the parent reacts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    continue_without_parent()
    watcher = threading.Thread(target=_send_heartbeats, args=(folder, parent_id), daemon=True)
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


def _send_heartbeats(folder: Path, parent_id: int) -> None:
    """Send a heartbeat every half second; end the process once its parent has ended."""
    socket = _connect(zmq.Context(), zmq.PUSH, folder / REPORTS)
    beat, wait = encode(Heartbeat()), threading.Event().wait
    while os.getppid() == parent_id:
        socket.send(beat)
        wait(HEARTBEAT_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(FAILED)


class _ZmqChannel:
    """One socket receives all commands. A ROUTER sends reports to other front ends, and drops them for a front end that
    has gone. Front ends send Join to it, since a ROUTER only knows peers that have sent a message."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self._inbox = _connect(self._context, zmq.PULL, folder / COMMANDS)
        self._inbox.bind(f"ipc://{folder / SHARED_COMMANDS}")
        self._outbox = _connect(self._context, zmq.PUSH, folder / REPORTS)
        self._front_ends = self._context.socket(zmq.ROUTER)
        self._front_ends.set_hwm(0)
        self._front_ends.bind(f"ipc://{folder / SHARED_REPORTS}")
        self._poller = zmq.Poller()
        for each in (self._inbox, self._front_ends):
            self._poller.register(each, zmq.POLLIN)

    def receive(self, timeout_s: float | None) -> Sequence[tuple[str, Command]]:
        commands: list[tuple[str, Command]] = []
        timeout_ms = None if timeout_s is None else int(timeout_s * 1e3)
        while ready := self._poller.poll(timeout_ms):
            for socket, _ in ready:
                name, command = socket.recv_multipart()
                commands.append((name.decode(), decode_command(command)))
            timeout_ms = 0
        return commands

    def send(self, report: Report, name: str = MAIN) -> None:
        if name == MAIN:
            self._outbox.send(encode(report))
        else:
            self._front_ends.send_multipart((name.encode(), encode(report)))

    def close(self) -> None:
        """Wait up to a second until the clients have received everything."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=1000)
        self._front_ends.close(linger=1000)
        self._context.term()


def _connect(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, path: Path) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.connect(f"ipc://{path}")
    return socket


if __name__ == "__main__":
    main()
