"""Block space manager of paged memory: a sum of rows as for virtual memory, plus the ids of the blocks."""

from __future__ import annotations

from sarathi.core.block_space_manager.base import BlockSpaceError, Grant
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.messages import CacheCapacity
from sarathi.request import Request


class PagedBlockSpaceManager(VirtualBlockSpaceManager):
    """Assigns block ids; the sum of rows decides how many may be in use at a time.

    A smaller capacity limits the number of blocks in use, not which ones: the tensors keep all of them.
    """

    def __init__(self, capacity: CacheCapacity) -> None:
        super().__init__(capacity)
        self._num_blocks = capacity.rows
        self._free = list(range(capacity.rows - 1, -1, -1))
        self._blocks: dict[str, list[int]] = {}

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        held = self._rows.get(request.request_id, 0)
        grant = super().allocate(request, num_tokens, spare_rows)
        if grant is None:
            return None
        first = len(self._free) - (self._rows[request.request_id] - held)
        added = self._free[first:]
        del self._free[first:]
        self._blocks.setdefault(request.request_id, []).extend(added)
        return Grant(grant.num_tokens, tuple(added))

    def free(self, request: Request) -> None:
        super().free(request)
        self._free.extend(reversed(self._blocks.pop(request.request_id, [])))

    def clear(self) -> None:
        super().clear()
        self._blocks.clear()
        self._free = list(range(self._num_blocks - 1, -1, -1))

    def resize(self, rows: int) -> None:
        super().resize(rows)
        self._free.extend(range(self._num_blocks, rows))
        self._num_blocks = max(self._num_blocks, rows)

    def check_integrity(self) -> None:
        super().check_integrity()
        held = [block for blocks in self._blocks.values() for block in blocks]
        if sorted(held + self._free) != list(range(self._num_blocks)):
            raise BlockSpaceError(f"of {self._num_blocks} blocks {len(held)} are held and {len(self._free)} free")
        if len(held) != self.num_used_rows:
            raise BlockSpaceError(f"{self.num_used_rows} rows are counted, but {len(held)} blocks are held")
