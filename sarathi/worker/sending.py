"""What a worker does for requests whose keys and values another engine takes."""

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
