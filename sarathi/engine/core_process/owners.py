"""Maps requests to the front ends that own them when several front ends share one core."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from sarathi.engine.core_process.wire import Refused, Report, StepFailed, StepOutputs

if TYPE_CHECKING:
    from sarathi.messages import CoreOutput

T = TypeVar("T")
MAIN = ""
"""The name of the process that started the core."""


class Owners:
    """Sends each front end reports about its own requests only. send: sends a report to the front end of this name."""

    def __init__(self, send: Callable[[Report, str], None]) -> None:
        self._send = send
        self._names: dict[str, str] = {}  # by request id; requests of MAIN are not stored
        self._gone: set[str] = set()

    def is_gone(self, name: str) -> bool:
        """Whether this front end has left; its late commands are ignored."""
        return name in self._gone

    def add(self, name: str, request_ids: Iterable[str]) -> None:
        """Record requests of a front end."""
        if name != MAIN:
            self._names.update(dict.fromkeys(request_ids, name))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Remove finished requests."""
        for request_id in request_ids:
            self._names.pop(request_id, None)

    def leave(self, name: str) -> list[str]:
        """Remove a front end and return its unfinished requests. Its name is never used again."""
        self._gone.add(name)
        left = [request_id for request_id, owner in self._names.items() if owner == name]
        self.forget(left)
        return left

    def send_outputs(self, output: CoreOutput) -> None:
        """Send one step's updates to their owners."""
        if not self._names:
            self._send(StepOutputs(output.updates, output.first_scheduled, output.scheduled_at_s), MAIN)
            return
        started = dict(self._by_owner(output.first_scheduled, lambda request_id: request_id))
        updated = dict(self._by_owner(output.updates, lambda update: update.request_id))
        for name in started.keys() | updated.keys():
            share = StepOutputs(updated.get(name, ()), started.get(name, ()), output.scheduled_at_s)
            self._send(share, name)
        self.forget([each.request_id for each in output.updates if each.finish_reason is not None])

    def send_refused(self, name: str, request_ids: tuple[str, ...], message: str) -> None:
        """Report that these requests of one front end were rejected."""
        self.forget(request_ids)
        self._send(Refused(request_ids, message), name)

    def send_failed(self, request_ids: Sequence[str], message: str) -> None:
        """Report that a failed step has ended these requests."""
        for name, share in self._by_owner(request_ids, lambda request_id: request_id):
            self._send(StepFailed(share, message), name)
        self.forget(request_ids)

    def _by_owner(self, items: Sequence[T], request_of: Callable[[T], str]) -> Iterator[tuple[str, tuple[T, ...]]]:
        """Group items by the front end that owns them."""
        shares: defaultdict[str, list[T]] = defaultdict(list)
        for each in items:
            shares[self._names.get(request_of(each), MAIN)].append(each)
        return ((name, tuple(share)) for name, share in shares.items())
