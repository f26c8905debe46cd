"""The size of a KV cache, its memory statistics and its prefix cache statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """The size of the cache in rows, the unit of the block space manager.

    Virtual memory: a row is one page in every region, token_bytes is one token's share of one region.
    Paged: a row is a block, token_bytes is 1 and page_bytes is the tokens of a block.
    over_read_tokens: kernels may read this many tokens past a request's last one, so that memory must be mapped there.
    num_retained: maximum number of retained sequences of finished requests; 0: no prefix caching.
    share_rows: sequences share memory in multiples of this many rows, which contain whole tokens; retained sequences
        are truncated to such multiples.
    """

    rows: int
    token_bytes: int
    page_bytes: int
    over_read_tokens: int = 0
    num_retained: int = 0
    share_rows: int = 1

    def rows_for(self, num_tokens: int) -> int:
        """Rows that num_tokens tokens of one request need."""
        mapped_tokens = num_tokens + self.over_read_tokens if num_tokens else 0
        return -(-mapped_tokens * self.token_bytes // self.page_bytes)

    def tokens_in(self, rows: int) -> int:
        """Tokens of one request that fit in rows: the largest n with rows_for(n) <= rows."""
        return max(0, self.tokens_within(rows) - self.over_read_tokens)

    def tokens_within(self, rows: int) -> int:
        """Tokens whose memory lies within the first rows of a request."""
        return rows * self.page_bytes // self.token_bytes

    def rows_holding(self, num_tokens: int) -> int:
        """Rows that hold the first num_tokens tokens of a request, in whole shares."""
        return self.whole_shares(-(-num_tokens * self.token_bytes // self.page_bytes))

    def whole_shares(self, rows: int) -> int:
        """The least multiple of share_rows that is at least `rows`."""
        return -(-rows // self.share_rows) * self.share_rows

    def shareable(self, num_tokens: int) -> tuple[int, int]:
        """The most rows that hold nothing but the first num_tokens tokens, and how many of these."""
        rows = num_tokens * self.token_bytes // (self.share_rows * self.page_bytes) * self.share_rows
        return rows, self.tokens_within(rows)


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """The cache's memory in bytes, over all layers, and the cost of managing it so far.

    reserved: virtual addresses. created: physical memory. mapped: physical memory mapped at some address. idle: mapped,
    but used by no request; includes retained prefixes; reused as soon as a request needs it. wasted: mapped for a
    request, but past its last token. steps_waited: steps that had to wait for a page.
    """

    reserved_bytes: int = 0
    created_bytes: int = 0
    mapped_bytes: int = 0
    idle_bytes: int = 0
    wasted_bytes: int = 0
    peak_mapped_bytes: int = 0
    driver_calls: int = 0
    driver_s: float = 0.0
    steps_waited: int = 0

    @classmethod
    def sum_of(cls, parts: Iterable[MemoryStats]) -> MemoryStats:
        """The sum over several caches."""
        each = [astuple(part) for part in parts]
        return cls(*[sum(values) for values in zip(*each, strict=True)])


class PrefixCacheStats(NamedTuple):
    """Tokens and rows since the start. queried: prompt tokens of started requests; hit: those found in the cache.

    num_retained, num_retained_rows: current sequences of finished requests, and the rows that only they use.
    """

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_mapped_tokens: int = 0
    num_copied_tokens: int = 0
    num_evicted_rows: int = 0
    num_retained: int = 0
    num_retained_rows: int = 0
