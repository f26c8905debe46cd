"""In-memory store of responses that clients may retrieve or continue."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from sarathi.entrypoints.server.errors import APIError

_MAX_RESPONSES = 4096
_MAX_BYTES = 256 << 20


@dataclass
class StoredResponse:
    """input_items: of this request. history: all items of the conversation before the output."""

    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    history: list[dict[str, Any]]

    @property
    def items(self) -> list[dict[str, Any]]:
        """The conversation including the output."""
        return [*self.history, *self.response["output"]]


class ResponseStore:
    """Evicts the oldest responses above max_responses, or above max_bytes of JSON."""

    def __init__(self, max_responses: int = _MAX_RESPONSES, max_bytes: int = _MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, stored: StoredResponse) -> None:
        """Store or update a response."""
        name = stored.response["id"]
        self._drop(name)
        self._stored[name] = stored
        self._sizes[name] = len(msgspec.json.encode((stored.response, stored.history)))
        self._num_bytes += self._sizes[name]
        while self._stored and (len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes):
            self._drop(next(iter(self._stored)))

    def get(self, name: str) -> StoredResponse:
        """Raises APIError with status 404 if it is not stored."""
        if name not in self._stored:
            raise APIError(404, f"Response with id {name!r} not found.", param="response_id")
        return self._stored[name]

    def delete(self, name: str) -> None:
        """Raises the same error as `get`."""
        self.get(name)
        self._drop(name)

    def _drop(self, name: str) -> None:
        if self._stored.pop(name, None) is not None:
            self._num_bytes -= self._sizes.pop(name)
