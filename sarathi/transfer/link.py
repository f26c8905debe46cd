"""Transports cache ranges from a rank to the same rank of another engine."""

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
"""Transfers in progress."""
_TIMEOUT = timedelta(days=1)  # effectively none: executors monitor their ranks


class Link(Protocol):
    """One end of a link. Both ends must pass the same ranges in the same order."""

    def announce(self, message: Any) -> None:
        """Tell the other end what is sent next. Does not block."""

    def next_announcement(self) -> Any:
        """Wait for the other end's next `announce`."""

    def send(self, ranges: Sequence[Tensor]) -> Transfers:
        """Start to send contiguous ranges. They must not change until `wait` returns. Does not block."""

    def receive(self, ranges: Sequence[Tensor]) -> Transfers:
        """Start to receive into contiguous ranges. They must not be used until `wait` returns. Does not block."""

    def wait(self, transfers: Transfers) -> None:
        """Wait until all transfers have completed."""


class RankLink(Link):
    """A link to a rank in another process: gloo on CPUs, NCCL on GPUs.

    On a GPU, a range is sent in a separate stream: after all work submitted before, concurrently with later work.
    """

    def __init__(self, store: tuple[str, int], rank: int, side: int, device: torch.device) -> None:
        """store: host and port of a TCPStore for the rendezvous. side: SENDER or RECEIVER.

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
        with self._own_stream():
            return [self._group.recv([each], self._peer, 0) for each in ranges]

    def wait(self, transfers: Transfers) -> None:
        """On a GPU, the link's stream waits for the transfers, and the host waits only for this stream."""
        with self._own_stream():
            for each in transfers:
                each.wait()
            if self._stream is not None:
                self._stream.synchronize()

    def _own_stream(self) -> Any:
        """On a GPU, a stream that is not ordered with the model's work."""
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)  # of this thread
        return torch.cuda.stream(self._stream)
