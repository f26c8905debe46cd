"""A rank's process on the executor's machine. It inherits a pipe, shared memory and an eventfd."""

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from sarathi.executor.ranks import service
from sarathi.executor.ranks.board import Board
from sarathi.executor.ranks.broadcast import Receiver
from sarathi.executor.ranks.protocol import RankSetup
from sarathi.parent_death import continue_without_parent

_HEARTBEAT_S = 0.1


class _Channel:
    """The channel of a rank on this machine: commands in shared memory, replies over a pipe."""

    def __init__(self, commands: Receiver, connection: Connection) -> None:
        self._commands, self._connection = commands, connection

    def receive(self) -> bytes:
        return self._commands.receive()

    def send(self, reply: bytes) -> None:
        self._connection.send_bytes(reply)


def main(connection: int, board: int, ring: int, waker: int) -> None:
    """Serve until the executor sends "close" or ends. Arguments: inherited file descriptors."""
    continue_without_parent()
    pipe = Connection(connection)
    setup: RankSetup = pickle.loads(pipe.recv_bytes())
    size, rank = setup.grid.size, setup.rank
    channel = _Channel(Receiver(ring, size, rank, waker), pipe)
    shared = Board(board, size)
    shared.beat(rank)
    threading.Thread(target=_send_heartbeats, args=(shared, rank, os.getppid()), daemon=True).start()
    try:
        service.serve(channel, setup, lambda rows: shared.agree(rank, rows))
    except (EOFError, ConnectionError):  # the executor has ended
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads of the process group may be waiting for ranks that have ended


def _send_heartbeats(board: Board, rank: int, parent: int, leave: Callable[[int], None] = os._exit) -> None:
    """Send heartbeats until the parent has ended, then end this process, whatever its other threads do."""
    while os.getppid() == parent:
        board.beat(rank)
        time.sleep(_HEARTBEAT_S)
    leave(1)
