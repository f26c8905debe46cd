"""Block space manager of contiguous virtual memory: a sum of rows. The native cache decides which page is where."""

from __future__ import annotations

from dataclasses import replace

from sarathi.core.block_space_manager.base import BlockSpaceError, Grant
from sarathi.messages import CacheCapacity
from sarathi.request import Request


class VirtualBlockSpaceManager:
    """Keeps the sum of rows_for(length) over all requests within the capacity."""

    prefixes = None

    def __init__(self, capacity: CacheCapacity) -> None:
        self.capacity = capacity
        self.num_used_rows = 0
        self._rows: dict[str, int] = {}

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        held = self._rows.get(request.request_id, 0)
        rows = max(held, self.capacity.rows_for(num_tokens))
        if self.num_used_rows + rows - held + spare_rows > self.capacity.rows:
            return None
        self._rows[request.request_id] = rows
        self.num_used_rows += rows - held
        return Grant(self.capacity.tokens_in(rows))

    def free(self, request: Request) -> None:
        self.num_used_rows -= self._rows.pop(request.request_id, 0)

    def clear(self) -> None:
        self._rows.clear()
        self.num_used_rows = 0

    def resize(self, rows: int) -> None:
        self.capacity = replace(self.capacity, rows=max(0, rows))

    def check_integrity(self) -> None:
        total = sum(self._rows.values())
        if total != self.num_used_rows or any(rows < 1 for rows in self._rows.values()):
            raise BlockSpaceError(f"{self.num_used_rows} rows are counted, but requests hold {total}: {self._rows}")
