"""The decode engine's side of a transfer: receives keys and values while steps run."""

import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from sarathi.messages import Portion
from sarathi.transfer.link import Link
from sarathi.transfer.sender import Ranges


class Receiver:
    """A thread starts to receive each portion when it is announced. The portion's memory must already be mapped."""

    def __init__(self, link: Link, cache: Ranges) -> None:
        self._link, self._cache = link, cache
        self._changed = threading.Condition()
        self._transfers: defaultdict[str, list[Any]] = defaultdict(list)
        self._counts: Counter[str] = Counter()  # portions whose transfer has started
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="receive", daemon=True).start()

    def wait(self, request_id: str, num_portions: int) -> None:
        """Wait until num_portions portions of a request have arrived. Its memory may be reused afterwards."""
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
                self._receive_portions(self._link.next_announcement())
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _receive_portions(self, portions: Sequence[Portion]) -> None:
        """Uses the sender's order: by layer, then by portion."""
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
