"""The ledger's verbs: who holds how many rows of the cache. Knows no tensors and no devices.

One verb may refuse. There is no "can allocate" to ask first: the answer would be stale by the time it is used.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from sarathi.messages import CacheCapacity
from sarathi.request import Request


class Grant(NamedTuple):
    """Memory given to a request.

    num_tokens: length that all its rows together hold, at least what was asked for.
    block_ids: blocks added by this call, in order; () where memory is contiguous.
    """

    num_tokens: int
    block_ids: tuple[int, ...] = ()


class BlockSpaceManager(Protocol):
    """Promises never to grant more rows than there are.

    After a shrinking resize the rows in use may exceed the capacity; everything is refused until enough are freed.
    """

    @property
    def capacity(self) -> CacheCapacity: ...

    @property
    def num_used_rows(self) -> int: ...

    @property
    def is_overcommitted(self) -> bool:
        """Whether more rows are in use than there are."""

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        """Make `request` hold memory for num_tokens in all, or None, with nothing changed, where that is too much.

        spare_rows: rows that must be left free behind it.
        """

    def free(self, request: Request) -> None:
        """Take back all that `request` holds; nothing happens if that is nothing."""

    def clear(self) -> None:
        """Nobody holds anything from now on, even where the books did not balance."""

    def resize(self, rows: int) -> None:
        """Have `rows` rows from now on."""

    def check_integrity(self) -> None:
        """Raise LedgerError unless every row is accounted for exactly once."""


class LedgerError(RuntimeError):
    """The books do not balance: an error in this program, not in its input."""
