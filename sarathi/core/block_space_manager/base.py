"""Interface of the block space managers, which count the rows of the KV cache that each request holds.

Only `allocate` can refuse. There is no "can allocate" query, because its answer would be stale when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from sarathi.messages import CacheCapacity, Chunk, PrefixCacheStats, PrefixChanges, PrefixGroup
from sarathi.request import Request


class Grant(NamedTuple):
    """Memory given to a request.

    num_tokens: tokens that fit in all rows of the request; at least what was asked for.
    num_cached_tokens: leading tokens that are computed already, of a request that starts.
    block_ids: blocks added by this call, in order; () for contiguous memory.
    """

    num_tokens: int
    block_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0


class Hit(NamedTuple):
    """What the cache holds of a request that has not started.

    num_cached_tokens: leading tokens that need not be computed. num_awaited_tokens: those behind them that a running
    request is about to compute; 0 where it is not worth to wait for them.
    """

    num_cached_tokens: int = 0
    num_awaited_tokens: int = 0


class PrefixCache(Protocol):
    """Tokens of running, preempted and ended requests that other requests may begin with."""

    def find(self, request: Request) -> Hit:
        """What is cached of a request that may be started next; always less than all of its tokens."""

    def groups(self, chunks: Sequence[Chunk]) -> tuple[PrefixGroup, ...]:
        """What the decodes among a step's chunks share, as published before it. See SchedulerOutput."""

    def publish(self, requests: Iterable[Request]) -> PrefixChanges:
        """The computed tokens of running requests may be shared by the steps from here on.

        Returns what the workers have yet to be told about shared and retained memory.
        """

    def unpublish(self, request: Request) -> None:
        """Take back what was published beyond the request's computed tokens, which a failed step did not compute."""

    def end_step(self, request_ids: Iterable[str]) -> None:
        """A step in which these requests started is not in flight any more."""

    def discard(self, request: Request) -> None:
        """`free`, of which nothing is kept for others."""

    def evict_all(self) -> None:
        """Free the memory of ended requests, as far as no step in flight uses it."""

    @property
    def has_evicted(self) -> bool:
        """Whether the workers have yet to be told that retained memory is free."""

    @property
    def stats(self) -> PrefixCacheStats: ...


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
    def prefixes(self) -> PrefixCache | None:
        """None where requests share nothing."""

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        """Give `request` memory for num_tokens in total; None, with nothing changed, if the rows do not suffice.

        A request without memory may begin with tokens that are cached. spare_rows: rows that must remain free
        afterwards.
        """

    def free(self, request: Request) -> None:
        """Release all rows of `request`, which no step in flight has; does nothing if it holds none.

        A prefix cache may keep its computed tokens for others.
        """

    def clear(self) -> None:
        """Release every allocation, even if the accounting is inconsistent."""

    def resize(self, rows: int) -> None:
        """Set the capacity to `rows` rows."""

    def check_integrity(self) -> None:
        """Raise BlockSpaceError unless every row is accounted for exactly once."""


class BlockSpaceError(RuntimeError):
    """The accounting of rows is inconsistent: a defect of this program, not of its input."""
