"""Block space manager of paged memory: a sum of rows as for virtual memory, plus the ids of the blocks."""

from __future__ import annotations

from sarathi.core.block_space_manager.base import BlockSpaceError, Grant
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.messages import CacheCapacity
from sarathi.request import Request


class PagedBlockSpaceManager:
    """Assigns block ids; a VirtualBlockSpaceManager decides how many may be in use at a time.

    A smaller capacity limits the number of blocks in use, not which ones: the tensors keep all of them.
    """

    def __init__(self, capacity: CacheCapacity) -> None:
        self._sum = VirtualBlockSpaceManager(capacity)
        self._num_blocks = capacity.rows
        self._free = list(range(capacity.rows - 1, -1, -1))
        self._blocks: dict[str, list[int]] = {}

    @property
    def capacity(self) -> CacheCapacity:
        return self._sum.capacity

    @property
    def num_used_rows(self) -> int:
        return self._sum.num_used_rows

    @property
    def is_overcommitted(self) -> bool:
        return self._sum.is_overcommitted

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        held = self._sum.rows_of(request)
        grant = self._sum.allocate(request, num_tokens, spare_rows)
        if grant is None:
            return None
        first = len(self._free) - (self._sum.rows_of(request) - held)
        added = self._free[first:]
        del self._free[first:]
        self._blocks.setdefault(request.request_id, []).extend(added)
        return Grant(grant.num_tokens, tuple(added))

    def free(self, request: Request) -> None:
        self._sum.free(request)
        self._free.extend(reversed(self._blocks.pop(request.request_id, [])))

    def clear(self) -> None:
        self._sum.clear()
        self._blocks.clear()
        self._free = list(range(self._num_blocks - 1, -1, -1))

    def resize(self, rows: int) -> None:
        self._sum.resize(rows)
        self._free.extend(range(self._num_blocks, rows))
        self._num_blocks = max(self._num_blocks, rows)

    def check_integrity(self) -> None:
        self._sum.check_integrity()
        held = [block for blocks in self._blocks.values() for block in blocks]
        if sorted(held + self._free) != list(range(self._num_blocks)):
            raise BlockSpaceError(f"of {self._num_blocks} blocks {len(held)} are held and {len(self._free)} free")
        if len(held) != self._sum.num_used_rows:
            raise BlockSpaceError(f"{self._sum.num_used_rows} rows are counted, but {len(held)} blocks are held")
