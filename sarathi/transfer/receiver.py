"""The rank that goes on with requests: takes in what the other engine's rank sends, beside the steps."""

import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from sarathi.messages import Portion
from sarathi.transfer.link import Link
from sarathi.transfer.sender import Ranges


class Receiver:
    """A thread starts to fill the memory of each portion when it is announced. That memory is mapped before."""

    def __init__(self, link: Link, cache: Ranges) -> None:
        self._link, self._cache = link, cache
        self._changed = threading.Condition()
        self._transfers: defaultdict[str, list[Any]] = defaultdict(list)
        self._counts: Counter[str] = Counter()  # of portions that have begun
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="receive", daemon=True).start()

    def wait(self, request_id: str, num_portions: int) -> None:
        """Return when so many portions of a request are there. Its memory may be used for others afterwards."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._counts[request_id] >= num_portions)
            if self._error is not None:
                raise self._error
            transfers = self._transfers.pop(request_id, [])
            del self._counts[request_id]
        self._link.wait(transfers)

    def _run(self) -> None:
        try:
            while True:
                self._take(self._link.next_announcement())
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self, portions: Sequence[Portion]) -> None:
        """The order of the sender: by layer, then by portion."""
        of_layers = zip(*[self._cache.ranges(*portion) for portion in portions], strict=True)
        started = [
            (portion.request_id, self._link.receive(ranges))
            for of_layer in of_layers
            for portion, ranges in zip(portions, of_layer, strict=True)
        ]
        with self._changed:
            for request_id, transfers in started:
                self._transfers[request_id] += transfers
            self._counts.update(portion.request_id for portion in portions)
            self._changed.notify_all()
