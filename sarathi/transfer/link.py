"""What carries the ranges of a cache from a rank to the same rank of another engine."""

import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # stubs lack them

SENDER, RECEIVER = 0, 1
Transfers = Sequence[Any]
"""Ranges under way."""
_TIMEOUT = timedelta(days=1)  # executors watch their ranks


class Link(Protocol):
    """One end. Both ends name the same ranges in the same order."""

    def announce(self, message: Any) -> None:
        """Tell the other end what is sent next. Does not wait for it."""

    def next_announcement(self) -> Any:
        """Waits for it."""

    def send(self, ranges: Sequence[Tensor]) -> Transfers:
        """Start to send contiguous ranges, which stay as they are until `wait` returns. Returns at once."""

    def receive(self, ranges: Sequence[Tensor]) -> Transfers:
        """Start to fill contiguous ranges, which are not touched until `wait` returns. Returns at once."""

    def wait(self, transfers: Transfers) -> None:
        """Return when all of it has arrived or left."""


class RankLink(Link):
    """To a rank in another process: gloo on CPUs, NCCL on GPUs.

    On a GPU a range leaves in a stream of its own, after the work that was submitted before and beside what follows.
    """

    def __init__(self, store: tuple[str, int], rank: int, side: int, device: torch.device) -> None:
        """store: host and port of a TCPStore, where the ends find each other. side: SENDER or RECEIVER.

        Waits for the other end.
        """
        mine = PrefixStore(f"rank {rank}", TCPStore(*store, is_master=False, timeout=_TIMEOUT))
        self._announcements, self._numbers, self._peer = mine, count(), 1 - side
        self._device, self._stream = device, None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            nccl = torch.distributed.ProcessGroupNCCL
            self._group: Any = nccl(mine, side, 2, nccl.Options())
        else:
            self._group = ProcessGroupGloo(mine, side, 2, _TIMEOUT)

    def announce(self, message: Any) -> None:
        self._announcements.set(f"announcement {next(self._numbers)}", pickle.dumps(message))  # type: ignore[arg-type]

    def next_announcement(self) -> Any:
        key = f"announcement {next(self._numbers)}"
        message = pickle.loads(self._announcements.get(key))
        self._announcements.delete_key(key)
        return message

    def send(self, ranges: Sequence[Tensor]) -> Transfers:
        return [self._group.send([each], self._peer, 0) for each in ranges]

    def receive(self, ranges: Sequence[Tensor]) -> Transfers:
        with self._apart():
            return [self._group.recv([each], self._peer, 0) for each in ranges]

    def wait(self, transfers: Transfers) -> None:
        """On a GPU it is a stream that waits for them, and the host for this stream alone."""
        with self._apart():
            for each in transfers:
                each.wait()
            if self._stream is not None:
                self._stream.synchronize()

    def _apart(self) -> Any:
        """On a GPU, work is not ordered with that of the model."""
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)  # of this thread
        return torch.cuda.stream(self._stream)
