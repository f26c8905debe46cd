"""Interface of the block space managers, which count the rows of the KV cache that each request holds.

Only `allocate` can refuse. There is no "can allocate" query, because its answer would be stale when it is used.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from sarathi.messages import CacheCapacity
from sarathi.request import Request


class Grant(NamedTuple):
    """Memory given to a request.

    num_tokens: tokens that fit in all rows of the request; at least what was asked for.
    block_ids: blocks added by this call, in order; () for contiguous memory.
    """

    num_tokens: int
    block_ids: tuple[int, ...] = ()


class BlockSpaceManager(Protocol):
    """Never grants more rows than the capacity.

    After `resize` to a smaller capacity the rows in use may exceed it; every request is then refused until enough rows
    are freed.
    """

    @property
    def capacity(self) -> CacheCapacity: ...

    @property
    def num_used_rows(self) -> int: ...

    @property
    def is_overcommitted(self) -> bool:
        """Whether more rows are in use than the capacity has."""

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        """Give `request` memory for num_tokens in total; None, with nothing changed, if the rows do not suffice.

        spare_rows: rows that must remain free afterwards.
        """

    def free(self, request: Request) -> None:
        """Release all rows of `request`; does nothing if it holds none."""

    def clear(self) -> None:
        """Release every allocation, even if the accounting is inconsistent."""

    def resize(self, rows: int) -> None:
        """Set the capacity to `rows` rows."""

    def check_integrity(self) -> None:
        """Raise BlockSpaceError unless every row is accounted for exactly once."""


class BlockSpaceError(RuntimeError):
    """The accounting of rows is inconsistent: a defect of this program, not of its input."""
