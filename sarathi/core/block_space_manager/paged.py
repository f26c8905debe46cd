"""Block space manager of paged memory: a sum of rows as for virtual memory, plus the ids of the blocks."""

from __future__ import annotations

from sarathi.core.block_space_manager.base import BlockSpaceError, Grant
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.messages import CacheCapacity
from sarathi.request import Request


class BlockPool:
    """Ids of free blocks, the lowest first.

    A smaller capacity limits the number of blocks in use, not which ones: the tensors keep all of them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))

    def take(self, count: int) -> list[int]:
        """Ids of `count` free blocks."""
        first = len(self.free) - count
        taken = self.free[first:]
        del self.free[first:]
        return taken

    def put(self, ids: list[int]) -> None:
        """Return blocks."""
        self.free.extend(reversed(ids))

    def clear(self) -> None:
        """Take every block back."""
        self.free = list(range(self.num_blocks - 1, -1, -1))

    def resize(self, rows: int) -> None:
        """Have at least so many blocks."""
        self.free.extend(range(self.num_blocks, rows))
        self.num_blocks = max(self.num_blocks, rows)


class PagedBlockSpaceManager(VirtualBlockSpaceManager):
    """Assigns block ids; the sum of rows decides how many may be in use at a time."""

    def __init__(self, capacity: CacheCapacity) -> None:
        super().__init__(capacity)
        self._pool = BlockPool(capacity.rows)
        self._blocks: dict[str, list[int]] = {}

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        held = self._rows.get(request.request_id, 0)
        grant = super().allocate(request, num_tokens, spare_rows)
        if grant is None:
            return None
        added = self._pool.take(self._rows[request.request_id] - held)
        self._blocks.setdefault(request.request_id, []).extend(added)
        return Grant(grant.num_tokens, tuple(added))

    def free(self, request: Request) -> None:
        super().free(request)
        self._pool.put(self._blocks.pop(request.request_id, []))

    def clear(self) -> None:
        super().clear()
        self._blocks.clear()
        self._pool.clear()

    def resize(self, rows: int) -> None:
        super().resize(rows)
        self._pool.resize(rows)

    def check_integrity(self) -> None:
        super().check_integrity()
        held = [block for blocks in self._blocks.values() for block in blocks]
        free, num_blocks = self._pool.free, self._pool.num_blocks
        if sorted(held + free) != list(range(num_blocks)):
            raise BlockSpaceError(f"of {num_blocks} blocks {len(held)} are held and {len(free)} free")
        if len(held) != self.num_used_rows:
            raise BlockSpaceError(f"{self.num_used_rows} rows are counted, but {len(held)} blocks are held")
