"""Block space manager that keeps the tokens of ended requests for prompts that begin alike.

Every sequence whose tokens are computed is in an index: of running, preempted and ended requests. A request that starts

    continues the sequence of an ended request, if that is its prefix but for a few tokens at the end, or
    shares whole rows of any other sequence, and copies the tokens behind them,

and computes the rest. The sequence of an ended request is retained until its rows are needed: then it goes, or a part
from its end, in the order of the eviction policy. Retained rows are free rows to everyone who asks.

used rows + retained rows <= capacity, where a row that several sequences share counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sarathi.core.block_space_manager.base import BlockSpaceError, Grant, Hit
from sarathi.core.block_space_manager.eviction import EvictionPolicy, EvictionQueue, lru
from sarathi.core.block_space_manager.prefix_groups import PrefixGroups
from sarathi.core.block_space_manager.prefix_index import Match, PrefixIndex
from sarathi.core.block_space_manager.recycling import BEGINNING_TOKENS, SHORT_TOKENS, UnusedSequences
from sarathi.core.block_space_manager.shared_rows import NoIds, RowPool, Run, SharedRows
from sarathi.messages import (
    EVERY_KEY,
    CacheCapacity,
    Chunk,
    PrefixCacheStats,
    PrefixChanges,
    PrefixGroup,
    SharedPrefix,
)
from sarathi.request import Request

_MIN_HIT_TOKENS = 16  # fewer are computed again: that takes no longer than to map or copy them
_MIN_WAIT_TOKENS = 64  # that a request waits for, while another one computes them
_LOST_SHARE = 128  # one of so many tokens is lost rather than the others are mapped again: that takes as long
_GROWTH_SHARE = 4  # one of so many rows of the cache is left for running requests rather than to unused sequences
_EVICTED_SHARE = 64  # one of so many rows of the cache is evicted at a time: pages move between slots in large pieces


@dataclass(eq=False, slots=True)
class _Sequence:
    """owner: request id, or the key of a retained sequence. tail: its last run; rows: up to there.

    num_pins: requests that share it in steps in flight. is_doomed: retained only because of pins.
    """

    owner: str | int
    tail: Run
    rows: int
    num_pins: int = 0
    is_doomed: bool = False

    @property
    def is_retained(self) -> bool:
        return isinstance(self.owner, int)


class _Pin(NamedTuple):
    """A sequence that may not be shortened below the rows up to `end`."""

    sequence: _Sequence
    end: Run


class _Prefix(NamedTuple):
    """What a request takes from another sequence: mapped rows with num_mapped tokens, and copies up to num_tokens.

    pinned_rows: rows of the other sequence that must stay until that is done.
    """

    mapped_rows: int
    num_mapped: int
    pinned_rows: int
    num_tokens: int


class _Share(NamedTuple):
    """See SharedPrefix."""

    request_id: str
    source: _Sequence
    num_mapped: int
    num_tokens: int
    source_block: int


@dataclass(slots=True)
class _Changes:
    retained: list[tuple[str, int]] = field(default_factory=list)
    evicted: dict[int, int] = field(default_factory=dict)
    continued: list[tuple[str, int]] = field(default_factory=list)
    shared: list[_Share] = field(default_factory=list)


class PrefixCachingBlockSpaceManager:
    """capacity.num_retained: sequences retained at most. pool: ids of rows, where they have any.

    cascades: whether the steps are told what running requests share.
    """

    def __init__(
        self, capacity: CacheCapacity, policy: EvictionPolicy = lru, pool: RowPool | None = None, *,
        cascades: bool = False,
    ) -> None:  # fmt: skip
        self._groups = PrefixGroups() if cascades else None
        self._capacity = capacity
        self._policy = policy
        self._pool = pool or NoIds()
        self._num_keys = 0
        self._stats = PrefixCacheStats()
        self._start_empty()

    def _start_empty(self) -> None:
        self._rows = SharedRows(self._pool)
        self._index, self._in_progress = PrefixIndex(), PrefixIndex()
        self._sequences: dict[str | int, _Sequence] = {}
        self._pins: dict[str, _Pin] = {}
        self._queue = EvictionQueue(self._eviction_key)
        self._without_rows: list[_Sequence] = []  # pinned, all rows in use: return to the queue later
        self._unused: UnusedSequences[_Sequence] = UnusedSequences()
        self._num_retained = 0
        self._changes = _Changes()
        self._without_copies: Request | None = None

    @property
    def capacity(self) -> CacheCapacity:
        return self._capacity

    @property
    def prefixes(self) -> PrefixCachingBlockSpaceManager:
        return self

    @property
    def num_used_rows(self) -> int:
        return self._rows.used

    @property
    def stats(self) -> PrefixCacheStats:
        return self._stats._replace(num_retained_rows=self._rows.kept, num_retained=self._num_retained)

    # A request starts.

    def find(self, request: Request) -> Hit:
        tokens, salt = request.token_array()[:-1], request.sampling_params.cache_salt
        if request.sampling_params.prompt_logprobs is not None:
            return Hit(0, 0)
        match = self._index.match(tokens, salt)
        num_cached = match.num_tokens
        if request is self._without_copies and not self._can_continue(match):
            num_cached = self._capacity.shareable(num_cached)[1]
        num_awaited = self._in_progress.match(tokens, salt).num_tokens - match.num_tokens
        return Hit(
            num_cached if num_cached >= _MIN_HIT_TOKENS else 0, num_awaited if num_awaited >= _MIN_WAIT_TOKENS else 0
        )

    def _start(self, request: Request, num_tokens: int, spare_rows: int) -> Grant | None:
        num_cached = self.find(request).num_cached_tokens
        total = self._capacity.rows_for(num_tokens)
        if num_cached:
            grant = self._start_from_cache(request, num_cached, total, spare_rows)
        else:
            grant = self._start_afresh(request, total, spare_rows)
        if grant is not None:
            self._note_started(request, num_cached)
        return grant

    def _start_from_cache(self, request: Request, num_cached: int, total: int, spare_rows: int) -> Grant | None:
        """Where the copies' source has to stay beside them and does not fit, the next try makes none."""
        match = self._index.match(request.token_array()[:num_cached], request.sampling_params.cache_salt)
        source = match.owner
        assert isinstance(source, _Sequence)
        if self._can_continue(match):
            if not self._fits(
                self._rows.kept_within(source.tail, source.rows) + max(0, total - source.rows) + spare_rows
            ):
                return None
            self._use(source)
            return self._continue(request, source, total, num_cached)
        mapped_rows, num_mapped = self._capacity.shareable(num_cached)
        pinned_rows = mapped_rows if num_mapped == num_cached else self._capacity.rows_holding(num_cached)
        prefix = _Prefix(mapped_rows, num_mapped, min(pinned_rows, source.rows), num_cached)
        if not self._fits(total - mapped_rows + spare_rows + self._rows.kept_within(source.tail, prefix.pinned_rows)):
            self._without_copies = request
            return None
        self._use(source)
        return self._share(request, source, total, prefix)

    def _can_continue(self, match: Match) -> bool:
        """Whether a retained sequence ends with the match, or has a few tokens behind it in rows of its own."""
        source = match.owner
        if not isinstance(source, _Sequence) or not source.is_retained:
            return False
        num_lost = self._length(source) - match.num_tokens
        if not num_lost or num_lost * _LOST_SHARE > match.num_tokens or source.num_pins:
            return not num_lost
        return source.rows - self._rows.loose(source.tail) <= self._capacity.shareable(match.num_tokens)[0]

    def _use(self, source: _Sequence) -> None:
        self._index.use(source)
        self._unused.discard(source)

    def _continue(self, request: Request, source: _Sequence, total: int, num_cached: int) -> Grant:
        assert isinstance(source.owner, int)
        self._index.truncate(source, num_cached)
        self._changes.continued.append((request.request_id, source.owner))
        self._rename(source, request.request_id)
        self._num_retained -= 1
        self._rows.use(source.tail)
        self._grow(source, total - source.rows)
        return Grant(self._capacity.tokens_in(source.rows), _ids(source.tail), num_cached)

    def _share(self, request: Request, source: _Sequence, total: int, prefix: _Prefix) -> Grant:
        end = self._rows.split(source.tail, prefix.pinned_rows)
        self._rows.use(end)
        source.num_pins += 1
        self._pins[request.request_id] = _Pin(source, end)
        block = (_ids(source.tail)[prefix.mapped_rows :] or (-1,))[0] if prefix.num_tokens > prefix.num_mapped else -1
        parent = self._rows.split(source.tail, prefix.mapped_rows) if prefix.mapped_rows else None
        sequence = self._add(request, parent, total - prefix.mapped_rows, total)
        share = _Share(request.request_id, source, prefix.num_mapped, prefix.num_tokens, block)
        self._changes.shared.append(share)
        self._index.insert(sequence, request.token_array()[: prefix.num_tokens], request.sampling_params.cache_salt)
        num_mapped = prefix.num_mapped
        self._count(num_mapped_tokens=num_mapped, num_copied_tokens=prefix.num_tokens - num_mapped)
        return Grant(self._capacity.tokens_in(total), _ids(sequence.tail), prefix.num_tokens)

    def _start_afresh(self, request: Request, total: int, spare_rows: int) -> Grant | None:
        if not self._fits(total + spare_rows):
            return None
        sequence = self._add(request, None, total, total)
        return Grant(self._capacity.tokens_in(total), _ids(sequence.tail))

    def _add(self, request: Request, parent: Run | None, own_rows: int, total: int) -> _Sequence:
        if parent is None:
            self._replace_unused(own_rows)
        self._make_room(own_rows)
        sequence = _Sequence(request.request_id, self._rows.add(parent, own_rows), total)
        self._sequences[request.request_id] = sequence
        return sequence

    def _note_started(self, request: Request, num_cached: int) -> None:
        self._count(num_queried_tokens=len(request.token_array()), num_hit_tokens=num_cached)
        if num_cached < BEGINNING_TOKENS:
            self._unused.note_miss(request.token_array(), request.sampling_params.cache_salt)
        if not request.output_token_ids:
            sequence, salt = self._sequences[request.request_id], request.sampling_params.cache_salt
            self._in_progress.insert(sequence, request.token_array()[:], salt)

    # A request runs.

    def allocate(self, request: Request, num_tokens: int, spare_rows: int = 0) -> Grant | None:
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return self._start(request, num_tokens, spare_rows)
        rows = max(sequence.rows, self._capacity.rows_for(num_tokens))
        if not self._fits(rows - sequence.rows + spare_rows):
            return None
        ids = self._grow(sequence, rows - sequence.rows)
        return Grant(self._capacity.tokens_in(rows), ids)

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
        return self._take_changes()

    def unpublish(self, request: Request) -> None:
        sequence = self._sequences.get(request.request_id)
        if sequence is not None and self._length(sequence):
            self._index.truncate(sequence, request.num_computed_tokens)

    def end_step(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            pin = self._pins.pop(request_id, None)
            if pin is not None:
                self._unpin(pin)
        self._make_room()

    def _unpin(self, pin: _Pin) -> None:
        sequence = pin.sequence
        sequence.num_pins -= 1
        self._unuse(pin.end)
        if sequence.is_doomed and not sequence.num_pins:
            self._evict(sequence)

    # A request ends, or is preempted.

    def free(self, request: Request) -> None:
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return
        if request.finish_reason != "error":
            self._index_computed(sequence, request)
        is_kept = request.finish_reason != "error" and self._length(sequence) >= _MIN_HIT_TOKENS
        if not is_kept and not sequence.num_pins:
            self.discard(request)
            return
        if self._num_retained >= self._capacity.num_retained:
            self._evict_first()
        if sequence.num_pins or self._num_retained < self._capacity.num_retained:
            self._keep(request, sequence, is_doomed=not is_kept)
        else:
            self.discard(request)

    def _keep(self, request: Request, sequence: _Sequence, is_doomed: bool) -> None:
        """is_doomed: the sequence cannot be found any more. What nobody uses of it is evicted now, the rest later."""
        self._in_progress.discard(sequence)
        self._rename(sequence, self._num_keys)
        self._changes.retained.append((request.request_id, self._num_keys))
        self._num_keys += 1
        self._num_retained += 1
        self._unuse(sequence.tail)
        sequence.is_doomed = is_doomed
        self._queue.push(sequence)
        self._queue.compact(self._num_retained)
        if is_doomed:
            self._index.discard(sequence)
            if unused := self._rows.unused(sequence.tail):
                self._shrink(sequence, sequence.rows - unused)
            return
        needed = self._capacity.whole_shares(self._capacity.rows_for(self._index.sequences[sequence].length))
        if needed < sequence.rows and not sequence.num_pins:
            self._truncate(sequence, needed)
        indexed = self._index.sequences[sequence]
        is_alone = self._rows.loose(sequence.tail) == sequence.rows
        if is_alone and not indexed.num_uses and indexed.length <= SHORT_TOKENS:
            self._unused.add(sequence, request.token_array(), request.sampling_params.cache_salt)
        self._make_room()

    def discard(self, request: Request) -> None:
        self.end_step([request.request_id])
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return
        if sequence.num_pins:
            self._keep(request, sequence, is_doomed=True)
            return
        del self._sequences[request.request_id]
        self._in_progress.discard(sequence)
        self._index.discard(sequence)
        self._unuse(sequence.tail)
        self._rows.drop(sequence.tail)

    @property
    def has_evicted(self) -> bool:
        return bool(self._changes.evicted)

    def _take_changes(self) -> PrefixChanges:
        changes, self._changes = self._changes, _Changes()
        shared = [
            SharedPrefix(share.request_id, share.source.owner, share.num_mapped, share.num_tokens, share.source_block)
            for share in changes.shared
        ]
        return PrefixChanges(
            tuple(changes.retained), tuple(changes.evicted.items()), tuple(changes.continued), tuple(shared)
        )

    # Retained sequences.

    def evict_all(self) -> None:
        """Evict what no step in flight uses."""
        while self._evict_first():
            pass

    def clear(self) -> None:
        self._pool.clear()
        self._start_empty()
        self._changes.evicted[EVERY_KEY] = 0

    def resize(self, rows: int) -> None:
        self._capacity = replace(self._capacity, rows=max(0, rows))
        self._pool.resize(rows)
        self._make_room()

    def check_integrity(self) -> None:
        self._index.check_integrity()
        self._in_progress.check_integrity()
        ends = [(sequence.tail, not sequence.is_retained, True) for sequence in self._sequences.values()]
        ends += [(pin.end, True, False) for pin in self._pins.values()]
        self._rows.check_integrity(ends)
        for sequence in self._sequences.values():
            if sequence.rows != sum(run.rows for run in sequence.tail.path()):
                raise BlockSpaceError(f"{sequence.owner!r} is said to hold {sequence.rows} rows")
            if self._length(sequence) > self._capacity.tokens_within(sequence.rows):
                raise BlockSpaceError(f"{sequence.owner!r} has {self._length(sequence)} tokens in {sequence.rows} rows")
        retained = [sequence for sequence in self._sequences.values() if sequence.is_retained]
        if len(retained) != self._num_retained or self._num_retained > self._capacity.num_retained:
            raise BlockSpaceError(f"{self._num_retained} sequences are counted as retained, of {len(retained)}")
        if self._rows.kept and self._rows.used + self._rows.kept > self._capacity.rows:
            raise BlockSpaceError(f"{self._rows.used} + {self._rows.kept} rows of {self._capacity.rows}")

    def _make_room(self, rows: int = 0) -> None:
        """Evict until so many rows are free, or nothing can be evicted."""
        while (missing := self._rows.used + self._rows.kept + rows - self._capacity.rows) > 0:
            sequence = self._first_to_evict()
            if sequence is None:
                return
            held = sequence.rows - self._rows.loose(sequence.tail)
            evicted = max(missing, self._capacity.rows // _EVICTED_SHARE)
            left = max(held, self._capacity.whole_shares(sequence.rows - evicted - self._capacity.share_rows + 1))
            if held < left < sequence.rows or (held < sequence.rows and sequence.num_pins):
                self._truncate(sequence, left)
            elif sequence.num_pins:
                self._truncate(sequence, sequence.rows - self._rows.unused(sequence.tail))
            else:  # nothing is left, or rows whose tokens are found through the others that hold them
                self._evict(sequence)

    def _replace_unused(self, rows: int) -> None:
        """Evict sequences that nobody has used, for a request without a hit that is about to take so many rows."""
        while (sequence := self._unused.replace(is_scarce=self._is_scarce(rows))) is not None:
            self._evict(sequence)
            if not self._is_scarce(rows):
                return

    def _is_scarce(self, more_rows: int) -> bool:
        """Whether with so many rows more too few are free for running requests to grow into."""
        rows = self._capacity.rows
        return self._rows.used + self._rows.kept + more_rows > rows - rows // _GROWTH_SHARE

    def _evict_first(self) -> bool:
        """Evict the first sequence that no step in flight uses. Others stay in the queue: they have rows to give."""
        pinned = []
        while (sequence := self._first_to_evict()) is not None and sequence.num_pins:
            self._queue.pop()
            pinned.append(sequence)
        if sequence is not None:
            self._evict(sequence)
        for each in pinned:
            self._queue.push(each)
        return sequence is not None

    def _first_to_evict(self) -> _Sequence | None:
        """A pinned sequence with nothing to give leaves the queue until other requests use fewer rows."""
        while (sequence := self._queue.first()) is not None:
            if not sequence.num_pins or self._rows.unused(sequence.tail):
                return sequence
            self._queue.pop()
            self._without_rows.append(sequence)
        return None

    def _unuse(self, end: Run) -> None:
        """One sequence or pin less uses the rows up to `end`, which may be those of sequences that had none to give."""
        self._rows.unuse(end)
        for sequence in self._without_rows:
            self._queue.push(sequence)
        self._without_rows.clear()

    def _truncate(self, sequence: _Sequence, rows: int) -> None:
        """Take the rows from `rows` on from a retained sequence, and their tokens from the index."""
        self._shrink(sequence, rows)
        if not sequence.is_doomed:
            self._index.truncate(sequence, self._capacity.tokens_within(rows))

    def _shrink(self, sequence: _Sequence, rows: int) -> None:
        """Take the rows from `rows` on from a retained sequence. The index does not change."""
        assert isinstance(sequence.owner, int)
        self._count(num_evicted_rows=sequence.rows - rows)
        sequence.tail = self._rows.shrink(sequence.tail, sequence.rows - rows)
        sequence.rows = rows
        self._changes.evicted[sequence.owner] = rows

    def _evict(self, sequence: _Sequence) -> None:
        assert isinstance(sequence.owner, int)
        self._count(num_evicted_rows=self._rows.loose(sequence.tail))
        self._index.discard(sequence)
        self._unused.discard(sequence)
        self._rows.drop(sequence.tail)
        self._num_retained -= 1
        del self._sequences[sequence.owner]
        self._changes.evicted[sequence.owner] = 0
        sequence.owner = EVERY_KEY

    # Small things.

    def _fits(self, more_rows: int) -> bool:
        return self._rows.used + more_rows <= self._capacity.rows

    def _grow(self, sequence: _Sequence, rows: int) -> tuple[int, ...]:
        """The ids of the new rows."""
        if rows <= 0:
            return ()
        self._make_room(rows)
        sequence.tail = self._rows.grow(sequence.tail, rows)
        sequence.rows += rows
        return tuple(sequence.tail.ids[-rows:])

    def _rename(self, sequence: _Sequence, owner: str | int) -> None:
        del self._sequences[sequence.owner]
        sequence.owner = owner
        self._sequences[owner] = sequence

    def _length(self, sequence: _Sequence) -> int:
        """Tokens of it that can be found."""
        indexed = self._index.sequences.get(sequence)
        return indexed.length if indexed else 0

    def _index_computed(self, sequence: _Sequence, request: Request) -> None:
        length = self._length(sequence)
        more = request.token_array()[length : request.num_computed_tokens]
        if more and length:
            self._index.extend(sequence, more)
        elif more:
            self._index.insert(sequence, more, request.sampling_params.cache_salt)

    def _eviction_key(self, sequence: _Sequence) -> tuple[int, ...] | None:
        """Rows of doomed sequences go first."""
        if sequence.is_doomed and sequence.num_pins:
            return ()
        indexed = self._index.sequences.get(sequence)
        return self._policy(indexed) if indexed and sequence.is_retained else None

    def _count(self, **more: int) -> None:
        stats = self._stats._asdict()
        self._stats = self._stats._replace(**{name: stats[name] + count for name, count in more.items()})


def _ids(tail: Run) -> tuple[int, ...]:
    """Ids of all rows up to a run, in order."""
    runs = [run.ids for run in tail.path()]
    return tuple(id for ids in reversed(runs) for id in ids)
