"""Messages between an executor and ranks on any machine, over ZeroMQ: commands, replies, signs of life, votes.

The sockets are open to the network of the machines, as Ray's own are, and trust who connects.
"""

import pickle
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import zmq

from sarathi.executor.ranks.protocol import Reply

BEAT_S = 0.25
_VOTE = struct.Struct("<qq")  # number of the vote; available rows, or _NONE
_NONE = -1
_LOOK_MS = 250


class HubAddresses(NamedTuple):
    """Where a rank connects to."""

    commands: str
    replies: str
    beats: str


class Hub:
    """The executor's end."""

    def __init__(self, host: str, size: int) -> None:
        self._size, self._context = size, zmq.Context()
        self._commands, commands = _bind(self._context, zmq.XPUB, host)
        self._replies, replies = _bind(self._context, zmq.PULL, host)
        self._beats, beats = _bind(self._context, zmq.PULL, host)
        self.addresses = HubAddresses(commands, replies, beats)
        self._beaten_s = [time.monotonic()] * size

    def wait_for_ranks(self, check: Callable[[], None]) -> None:
        """Until every rank receives commands. check: called several times a second; may raise."""
        _wait_for_subscribers(self._commands, self._size, check)
        self._beaten_s = [time.monotonic()] * self._size

    def send(self, message: bytes) -> None:
        self._commands.send(message)

    def receive(self, timeout_s: float) -> list[tuple[int, Reply | None]]:
        """Replies that have come, with their ranks."""
        replies: list[tuple[int, Reply | None]] = []
        while self._replies.poll(0 if replies else int(timeout_s * 1e3)):
            rank, reply = self._replies.recv_multipart()
            replies.append((int(rank), pickle.loads(reply)))
        return replies

    def silence_s(self, rank: int) -> float:
        """Seconds since a sign of life of this rank was read."""
        while self._beats.poll(0):
            self._beaten_s[int(self._beats.recv())] = time.monotonic()
        return time.monotonic() - self._beaten_s[rank]

    def close(self) -> None:
        self._context.destroy(linger=0)


class Link:
    """A rank's end."""

    def __init__(self, rank: int, hub: HubAddresses) -> None:
        self._rank, self._hub, self._context = str(rank).encode(), hub, zmq.Context()
        self._replies = _connect(self._context, zmq.PUSH, hub.replies)
        self._commands = _connect(self._context, zmq.SUB, hub.commands)
        self._commands.subscribe(b"")

    def receive(self) -> bytes:
        return self._commands.recv()

    def send(self, reply: bytes) -> None:
        self._replies.send_multipart([self._rank, reply])

    def beat_forever(self) -> None:
        """For a thread of its own. Beats that the executor does not read are dropped."""
        socket = _connect(self._context, zmq.PUSH, self._hub.beats, queue_length=1)
        while True:
            if socket.poll(0, zmq.POLLOUT):
                socket.send(self._rank)
            time.sleep(BEAT_S)


class Votes:
    """Every rank's answer to `prepare`, sent to every other rank."""

    def __init__(self, rank: int, size: int, host: str, store: Any) -> None:
        """store: a torch.distributed.Store, where the ranks find each other."""
        self._size, context = size, zmq.Context()
        self._own, address = _bind(context, zmq.XPUB, host)
        store.set(f"votes-of-{rank}", address)
        self._others = context.socket(zmq.SUB)
        self._others.set_hwm(0)
        self._others.subscribe(b"")
        for other in range(size):
            if other != rank:
                self._others.connect(store.get(f"votes-of-{other}").decode())
        _wait_for_subscribers(self._own, size - 1, lambda: None)
        self._number = 0
        self._early: dict[int, list[int]] = {}  # votes of ranks that are ahead

    def agree(self, available_rows: int | None) -> int | None:
        """Give this rank's answer and wait for the others': None where all are None, else the least number of rows."""
        self._number += 1
        vote = _NONE if available_rows is None else available_rows
        self._own.send(_VOTE.pack(self._number, vote))
        votes = [vote, *self._early.pop(self._number, [])]
        while len(votes) < self._size:
            number, vote = _VOTE.unpack(self._others.recv())
            (votes if number == self._number else self._early.setdefault(number, [])).append(vote)
        short = [each for each in votes if each != _NONE]
        return min(short) if short else None


def _bind(context: "zmq.Context[Any]", kind: int, host: str) -> "tuple[zmq.Socket[Any], str]":
    socket = context.socket(kind)
    socket.set_hwm(0)
    if kind == zmq.XPUB:
        socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # tell of every subscriber, not of the first alone
    port = socket.bind_to_random_port(f"tcp://{host}")
    return socket, f"tcp://{host}:{port}"


def _connect(context: "zmq.Context[Any]", kind: int, address: str, queue_length: int = 0) -> "zmq.Socket[Any]":
    socket: zmq.Socket[Any] = context.socket(kind)
    socket.set_hwm(queue_length)
    socket.connect(address)
    return socket


def _wait_for_subscribers(publisher: "zmq.Socket[Any]", count: int, check: Callable[[], None]) -> None:
    """What is published before a subscription arrives is lost to that subscriber."""
    while count:
        if publisher.poll(_LOOK_MS):
            publisher.recv()
            count -= 1
        check()
