"""What a worker does for a request whose keys and values another engine takes: nothing, unless it is told to."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from sarathi.messages import Portion


class Sending(Protocol):
    """Sends what a step computes while it is computed."""

    def attach(self, layers: list[Any]) -> None:
        """The model has been read again: these are its layers."""

    def start(self, portions: Sequence[Portion]) -> None:
        """The next step, whose memory is mapped, completes these."""

    def settle(self, request_ids: Iterable[str]) -> None:
        """Return when nothing of these requests is on its way, so that their memory may be used for others."""


class NoSending(Sending):
    """No engine takes anything."""

    def attach(self, layers: list[Any]) -> None:
        """Nothing is to be told of them."""

    def start(self, portions: Sequence[Portion]) -> None:
        """There are none."""

    def settle(self, request_ids: Iterable[str]) -> None:
        """Nothing is on its way."""
