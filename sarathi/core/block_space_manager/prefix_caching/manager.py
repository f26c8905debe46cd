"""Block space manager with prefix caching.

Every sequence whose tokens are computed is in an index: of running, preempted and ended requests. A request that starts

    continues the sequence of an ended request, if that is its prefix but for a few tokens at the end, or
    shares whole rows of any other sequence, and copies the tokens behind them,

and computes the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sarathi.core.block_space_manager.base import Grant, Hit
from sarathi.core.block_space_manager.prefix_caching.eviction import EvictionPolicy, lru
from sarathi.core.block_space_manager.prefix_caching.groups import PrefixGroups
from sarathi.core.block_space_manager.prefix_caching.index import Match, PrefixIndex
from sarathi.core.block_space_manager.prefix_caching.recycling import BEGINNING_TOKENS
from sarathi.core.block_space_manager.prefix_caching.sequences import CachedSequence, CachedSequences, Changes
from sarathi.core.block_space_manager.prefix_caching.shared_rows import RowPool, Run
from sarathi.messages import CacheCapacity, Chunk, PrefixChanges, PrefixGroup, SharedPrefix
from sarathi.request import Request

_MIN_HIT_TOKENS = 16  # fewer are computed again: that takes no longer than to map or copy them
_MIN_WAIT_TOKENS = 64  # that a request waits for, while another one computes them
_LOST_SHARE = 128  # one of so many tokens is lost rather than the others are mapped again: that takes as long


class _Pin(NamedTuple):
    """A sequence that may not be shortened below the rows up to `end`."""

    sequence: CachedSequence
    end: Run


class _Prefix(NamedTuple):
    """What a request takes from another sequence: mapped rows with num_mapped tokens, and copies up to num_tokens.

    pinned_rows: rows of the other sequence that must stay until that is done.
    """

    mapped_rows: int
    num_mapped: int
    pinned_rows: int
    num_tokens: int


class PrefixCachingBlockSpaceManager(CachedSequences):
    """cascades: whether the steps are told what running requests share. For the rest see CachedSequences."""

    def __init__(
        self, capacity: CacheCapacity, policy: EvictionPolicy = lru, pool: RowPool | None = None, *,
        cascades: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(capacity, policy, pool)
        self._groups = PrefixGroups() if cascades else None

    def _start_empty(self) -> None:
        super()._start_empty()
        self._in_progress = PrefixIndex()  # of prompts that are being computed, with all of their tokens
        self._pins: dict[str, _Pin] = {}
        self._without_copies: Request | None = None

    @property
    def prefixes(self) -> PrefixCachingBlockSpaceManager:
        return self

    def check_integrity(self) -> None:
        super().check_integrity()
        self._in_progress.check_integrity()
        ends = [(sequence.tail, not sequence.is_retained, True) for sequence in self._sequences.values()]
        ends += [(pin.end, True, False) for pin in self._pins.values()]
        self._rows.check_integrity(ends)

    # A request starts.

    def find(self, request: Request) -> Hit:
        if request.sampling_params.prompt_logprobs is not None:
            return Hit()
        tokens, salt = request.token_ids[:-1], request.sampling_params.cache_salt
        match = self._index.match(tokens, salt)
        num_cached = match.num_tokens
        if request is self._without_copies and not self._can_continue(match):
            num_cached = self.capacity.shareable(num_cached)[1]
        num_awaited = self._in_progress.match(tokens, salt).num_tokens - match.num_tokens
        return Hit(
            num_cached if num_cached >= _MIN_HIT_TOKENS else 0, num_awaited if num_awaited >= _MIN_WAIT_TOKENS else 0
        )

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return self._start(request, self.capacity.rows_for(num_tokens), spare_rows)
        rows = max(sequence.rows, self.capacity.rows_for(num_tokens))
        if not self._fits(rows - sequence.rows + spare_rows):
            return None
        ids = self._grow(sequence, rows - sequence.rows)
        return Grant(self.capacity.tokens_in(rows), ids)

    def _start(self, request: Request, rows: int, spare_rows: int) -> Grant | None:
        num_cached = self.find(request).num_cached_tokens
        tokens, salt = request.token_ids, request.sampling_params.cache_salt
        if num_cached:
            grant = self._start_from_cache(request, num_cached, rows, spare_rows)
        elif self._fits(rows + spare_rows):
            grant = Grant(self.capacity.tokens_in(rows), self._add(request, rows).tail.path_ids())
        else:
            grant = None
        if grant is not None:
            self._counts["num_queried_tokens"] += len(tokens)
            self._counts["num_hit_tokens"] += num_cached
            if num_cached < BEGINNING_TOKENS:
                self._unused.note_miss(tokens, salt)
            if not request.num_output_tokens:
                self._in_progress.insert(self._sequences[request.request_id], tokens[:], salt)
        return grant

    def _start_from_cache(self, request: Request, num_cached: int, rows: int, spare_rows: int) -> Grant | None:
        """Where the copies' source has to stay beside them and does not fit, the next try makes none."""
        match = self._index.match(request.token_ids[:num_cached], request.sampling_params.cache_salt)
        source = match.owner
        assert isinstance(source, CachedSequence)
        if self._can_continue(match):
            if not self._fits(
                self._rows.kept_within(source.tail, source.rows) + max(0, rows - source.rows) + spare_rows
            ):
                return None
            return self._continue(request, source, rows, num_cached)
        mapped_rows, num_mapped = self.capacity.shareable(num_cached)
        pinned_rows = mapped_rows if num_mapped == num_cached else self.capacity.rows_holding(num_cached)
        prefix = _Prefix(mapped_rows, num_mapped, min(pinned_rows, source.rows), num_cached)
        if not self._fits(rows - mapped_rows + spare_rows + self._rows.kept_within(source.tail, prefix.pinned_rows)):
            self._without_copies = request
            return None
        return self._share(request, source, rows, prefix)

    def _can_continue(self, match: Match) -> bool:
        """Whether a retained sequence ends with the match, or has a few tokens behind it in rows of its own."""
        source = match.owner
        if not isinstance(source, CachedSequence) or not source.is_retained:
            return False
        num_lost = self._index.length(source) - match.num_tokens
        if not num_lost or num_lost * _LOST_SHARE > match.num_tokens or source.num_pins:
            return not num_lost
        return source.rows - self._rows.exclusive(source.tail) <= self.capacity.shareable(match.num_tokens)[0]

    def _continue(self, request: Request, source: CachedSequence, rows: int, num_cached: int) -> Grant:
        assert isinstance(source.owner, int)
        self._note_use(source)
        self._index.truncate(source, num_cached)
        self._changes.continued.append((request.request_id, source.owner))
        self._rename(source, request.request_id)
        self._num_retained -= 1
        self._rows.use(source.tail)
        self._grow(source, rows - source.rows)
        return Grant(self.capacity.tokens_in(source.rows), source.tail.path_ids(), num_cached)

    def _share(self, request: Request, source: CachedSequence, rows: int, prefix: _Prefix) -> Grant:
        mapped_rows, num_mapped, pinned_rows, num_tokens = prefix
        self._note_use(source)
        end = self._rows.split(source.tail, pinned_rows)
        self._rows.use(end)
        source.num_pins += 1
        self._pins[request.request_id] = _Pin(source, end)
        block = (source.tail.path_ids()[mapped_rows:] or (-1,))[0] if num_tokens > num_mapped else -1
        parent = self._rows.split(source.tail, mapped_rows) if mapped_rows else None
        sequence = self._add(request, rows, parent, mapped_rows)
        shared = SharedPrefix(request.request_id, source.owner, num_mapped, num_tokens, block)
        self._changes.shared.append((source, shared))
        self._index.insert(sequence, request.token_ids[:num_tokens], request.sampling_params.cache_salt)
        self._counts["num_mapped_tokens"] += num_mapped
        self._counts["num_copied_tokens"] += num_tokens - num_mapped
        return Grant(self.capacity.tokens_in(rows), sequence.tail.path_ids(), num_tokens)

    def _note_use(self, source: CachedSequence) -> None:
        self._index.use(source)
        self._unused.discard(source)

    # A request runs.

    def groups(self, chunks: Sequence[Chunk]) -> tuple[PrefixGroup, ...]:
        if self._groups is None:
            return ()
        ends = {}
        for index, chunk in enumerate(chunks):
            if chunk.num_tokens == 1:
                indexed = self._index.sequences.get(self._sequences.get(chunk.request_id))
                if indexed is not None and indexed.length <= chunk.start:
                    ends[index] = indexed.node
        return self._groups.of(ends)

    def publish(self, requests: Iterable[Request]) -> PrefixChanges:
        for request in requests:
            sequence = self._sequences.get(request.request_id)
            if sequence is None:  # preempted in the same step
                continue
            self._index_computed(sequence, request)
            if request.num_computed_tokens + 1 >= request.num_prompt_tokens:  # the last one may be alone in its step
                self._in_progress.discard(sequence)
        changes, self._changes = self._changes, Changes()
        return changes.message()

    def unpublish(self, request: Request) -> None:
        sequence = self._sequences.get(request.request_id)
        if sequence is not None and self._index.length(sequence):
            self._index.truncate(sequence, request.num_computed_tokens)

    def _index_computed(self, sequence: CachedSequence, request: Request) -> None:
        length = self._index.length(sequence)
        more = request.token_ids[length : request.num_computed_tokens]
        if more and length:
            self._index.extend(sequence, more)
        elif more:
            self._index.insert(sequence, more, request.sampling_params.cache_salt)

    def end_step(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            pin = self._pins.pop(request_id, None)
            if pin is not None:
                pin.sequence.num_pins -= 1
                self._unuse(pin.end)
                if pin.sequence.is_doomed and not pin.sequence.num_pins:
                    self._evict(pin.sequence)
        self._make_room()

    # A request ends, or is preempted.

    def free(self, request: Request) -> None:
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return
        is_valid = request.finish_reason != "error"
        if is_valid:
            self._index_computed(sequence, request)
        is_kept = is_valid and self._index.length(sequence) >= _MIN_HIT_TOKENS
        if (is_kept or sequence.num_pins) and self._num_retained >= self.capacity.num_retained:
            self._evict_first()
        if is_kept and (sequence.num_pins or self._num_retained < self.capacity.num_retained):
            self._in_progress.discard(sequence)
            self._keep(request, sequence)
        else:
            self.discard(request)

    def discard(self, request: Request) -> None:
        self.end_step([request.request_id])
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return
        self._in_progress.discard(sequence)
        if sequence.num_pins:
            self._doom(request, sequence)
            return
        del self._sequences[request.request_id]
        self._index.discard(sequence)
        self._unuse(sequence.tail)
        self._rows.drop(sequence.tail)
