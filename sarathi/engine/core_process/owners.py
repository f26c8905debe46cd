"""Which front end each request belongs to, where several share one core."""

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
    """Tells each front end of its own requests, and of no others. send: passes a report to the front end of a name."""

    def __init__(self, send: Callable[[Report, str], None]) -> None:
        self._send = send
        self._names: dict[str, str] = {}  # by request; those of MAIN are not in it
        self._gone: set[str] = set()

    def has_left(self, name: str) -> bool:
        """Whether commands of this front end still arrive though it is gone."""
        return name in self._gone

    def add(self, name: str, request_ids: Iterable[str]) -> None:
        """Requests of a front end are queued."""
        if name != MAIN:
            self._names.update(dict.fromkeys(request_ids, name))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended of which nothing more is to be told."""
        for request_id in request_ids:
            self._names.pop(request_id, None)

    def leave(self, name: str) -> list[str]:
        """A front end is gone, and its name is not used again: the requests that it leaves behind."""
        self._gone.add(name)
        left = [request_id for request_id, owner in self._names.items() if owner == name]
        self.forget(left)
        return left

    def tell_outputs(self, output: CoreOutput) -> None:
        """One step's updates."""
        if not self._names:
            self._send(StepOutputs(output.updates, output.first_scheduled, output.scheduled_at_s), MAIN)
            return
        started = dict(self._shares(output.first_scheduled, lambda request_id: request_id))
        updated = dict(self._shares(output.updates, lambda update: update.request_id))
        for name in started.keys() | updated.keys():
            share = StepOutputs(updated.get(name, ()), started.get(name, ()), output.scheduled_at_s)
            self._send(share, name)
        self.forget([each.request_id for each in output.updates if each.finish_reason is not None])

    def tell_refused(self, name: str, request_ids: tuple[str, ...], message: str) -> None:
        """Requests of one front end are not queued."""
        self.forget(request_ids)
        self._send(Refused(request_ids, message), name)

    def tell_failed(self, request_ids: Sequence[str], message: str) -> None:
        """All requests of the core have ended."""
        for name, share in self._shares(request_ids, lambda request_id: request_id):
            self._send(StepFailed(share, message), name)
        self.forget(request_ids)

    def _shares(self, items: Sequence[T], request_of: Callable[[T], str]) -> Iterator[tuple[str, tuple[T, ...]]]:
        """The items of each front end."""
        shares: defaultdict[str, list[T]] = defaultdict(list)
        for each in items:
            shares[self._names.get(request_of(each), MAIN)].append(each)
        return ((name, tuple(share)) for name, share in shares.items())
