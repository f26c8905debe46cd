"""A rank's process on the executor's machine: pipe and shared memory are inherited."""

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from sarathi.executor.ranks import service
from sarathi.executor.ranks.board import Board
from sarathi.executor.ranks.protocol import RankSetup

_BEAT_S = 0.1


class _Pipe:
    """The channel of a rank on this machine."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def receive(self) -> bytes:
        return self._connection.recv_bytes()

    def send(self, reply: bytes) -> None:
        self._connection.send_bytes(reply)


def main(connection: int, board: int) -> None:
    """Serve until the executor closes the connection. Arguments: inherited file descriptors."""
    channel = _Pipe(Connection(connection))
    setup: RankSetup = pickle.loads(channel.receive())
    shared = Board(board, setup.grid.size)
    shared.beat(setup.rank)
    threading.Thread(target=_show_life, args=(shared, setup.rank, os.getppid()), daemon=True).start()
    try:
        service.serve(channel, setup, lambda rows: shared.agree(setup.rank, rows))
    except (EOFError, ConnectionError):  # the executor is gone
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads of the process group may wait for ranks that are gone


def _show_life(board: Board, rank: int, parent: int, leave: Callable[[int], None] = os._exit) -> None:
    """Beat until the parent is gone, then end the process, whatever it waits for."""
    while os.getppid() == parent:
        board.beat(rank)
        time.sleep(_BEAT_S)
    leave(1)
