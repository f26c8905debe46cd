"""What carries the ranges of a cache from one engine to another."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed
from torch import Tensor


class Link(Protocol):
    """One engine's end. Both ends name the same ranges in the same order."""

    def send(self, ranges: Sequence[Tensor]) -> None:
        """Start to send contiguous ranges, which stay as they are until `wait` returns. Returns at once."""

    def receive(self, ranges: Sequence[Tensor]) -> None:
        """Start to fill contiguous ranges, which are not touched until `wait` returns. Returns at once."""

    def wait(self) -> None:
        """Return when everything that was started has arrived or left."""

    def send_message(self, message: Any) -> None:
        """A small object that pickle can send."""

    def receive_message(self) -> Any:
        """The next small object; waits for it."""


class GroupLink(Link):
    """To the same place of another process: gloo on CPUs, NCCL on GPUs.

    On a GPU a range leaves in a stream of its own, after the work that was submitted before and beside what follows.
    """

    def __init__(self, peer: int, group: Any = None) -> None:
        """peer: its number in the default process group. group: a torch.distributed group of the two; None: default."""
        self._peer, self._group = peer, group
        self._started: list[Any] = []

    def send(self, ranges: Sequence[Tensor]) -> None:
        self._started += [torch.distributed.isend(each, self._peer, group=self._group) for each in ranges]

    def receive(self, ranges: Sequence[Tensor]) -> None:
        self._started += [torch.distributed.irecv(each, self._peer, group=self._group) for each in ranges]

    def wait(self) -> None:
        """On a GPU it is the current stream that waits, so the host waits for the stream."""
        for each in self._started:
            each.wait()
        self._started.clear()
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def send_message(self, message: Any) -> None:
        torch.distributed.send_object_list([message], self._peer, group=self._group)

    def receive_message(self) -> Any:
        found: list[Any] = [None]
        torch.distributed.recv_object_list(found, self._peer, group=self._group)
        return found[0]
