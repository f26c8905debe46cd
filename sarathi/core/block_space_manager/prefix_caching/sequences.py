"""The sequences in a KV cache with prefix caching: running requests, and retained sequences of ended ones.

A retained sequence is kept until its rows are needed: then it is evicted, or a part from its end, in the order of the
eviction policy. Retained rows are free rows to everyone who asks:

    used rows + retained rows <= capacity, where a row that several sequences share counts once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from sarathi.core.block_space_manager.base import BlockSpaceError
from sarathi.core.block_space_manager.prefix_caching.eviction import EvictionPolicy, EvictionQueue
from sarathi.core.block_space_manager.prefix_caching.index import PrefixIndex
from sarathi.core.block_space_manager.prefix_caching.recycling import SHORT_TOKENS, UnusedSequences
from sarathi.core.block_space_manager.prefix_caching.shared_rows import NoIds, RowPool, Run, SharedRows
from sarathi.messages import EVERY_KEY, CacheCapacity, PrefixCacheStats, PrefixChanges, SharedPrefix
from sarathi.request import Request

_GROWTH_SHARE = 4  # one of so many rows of the cache is left for running requests rather than to unused sequences
_EVICTED_SHARE = 64  # one of so many rows of the cache is evicted at a time: pages move between slots in large pieces


@dataclass(eq=False, slots=True)
class CachedSequence:
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


@dataclass(slots=True)
class Changes:
    """What the workers have yet to be told; see PrefixChanges. shared: with the source, whose owner may change."""

    retained: list[tuple[str, int]] = field(default_factory=list)
    evicted: dict[int, int] = field(default_factory=dict)
    continued: list[tuple[str, int]] = field(default_factory=list)
    shared: list[tuple[CachedSequence, SharedPrefix]] = field(default_factory=list)

    def message(self) -> PrefixChanges:
        """The message of one step."""
        shared = tuple([prefix._replace(source=source.owner) for source, prefix in self.shared])
        return PrefixChanges(tuple(self.retained), tuple(self.evicted.items()), tuple(self.continued), shared)


class CachedSequences:
    """Rows and tokens of every sequence, and the eviction of retained ones.

    capacity.num_retained: sequences retained at most. pool: ids of rows, where they have any.
    """

    def __init__(self, capacity: CacheCapacity, policy: EvictionPolicy, pool: RowPool | None) -> None:
        self.capacity = capacity
        self._policy = policy
        self._pool = pool or NoIds()
        self._num_keys = 0
        self._counts: Counter[str] = Counter()  # by the names of PrefixCacheStats
        self._start_empty()

    def _start_empty(self) -> None:
        self._rows = SharedRows(self._pool)
        self._index = PrefixIndex()
        self._sequences: dict[str | int, CachedSequence] = {}
        self._queue = EvictionQueue(self._eviction_key)
        self._without_rows: list[CachedSequence] = []  # pinned, all rows in use: return to the queue later
        self._unused: UnusedSequences[CachedSequence] = UnusedSequences()
        self._num_retained = 0
        self._changes = Changes()

    @property
    def num_used_rows(self) -> int:
        return self._rows.used

    @property
    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(**self._counts, num_retained=self._num_retained, num_retained_rows=self._rows.kept)

    @property
    def has_evicted(self) -> bool:
        return bool(self._changes.evicted)

    def evict_all(self) -> None:
        """Evict what no step in flight uses."""
        while self._evict_first():
            pass

    def clear(self) -> None:
        self._pool.clear()
        self._start_empty()
        self._changes.evicted[EVERY_KEY] = 0

    def resize(self, rows: int) -> None:
        self.capacity = replace(self.capacity, rows=max(0, rows))
        self._pool.resize(rows)
        self._make_room()

    def check_integrity(self) -> None:
        self._index.check_integrity()
        for sequence in self._sequences.values():
            if sequence.rows != sum(run.rows for run in sequence.tail.path()):
                raise BlockSpaceError(f"{sequence.owner!r} is said to hold {sequence.rows} rows")
            length = self._index.length(sequence)
            if length > self.capacity.tokens_within(sequence.rows):
                raise BlockSpaceError(f"{sequence.owner!r} has {length} tokens in {sequence.rows} rows")
        retained = [sequence for sequence in self._sequences.values() if sequence.is_retained]
        if len(retained) != self._num_retained or self._num_retained > self.capacity.num_retained:
            raise BlockSpaceError(f"{self._num_retained} sequences are counted as retained, of {len(retained)}")
        if self._rows.kept and self._rows.used + self._rows.kept > self.capacity.rows:
            raise BlockSpaceError(f"{self._rows.used} + {self._rows.kept} rows of {self.capacity.rows}")

    # Running sequences.

    def _fits(self, more_rows: int) -> bool:
        return self._rows.used + more_rows <= self.capacity.rows

    def _add(self, request: Request, rows: int, parent: Run | None = None, mapped_rows: int = 0) -> CachedSequence:
        """A running sequence of `rows` rows, of which it shares the first mapped_rows, up to `parent`."""
        own_rows = rows - mapped_rows
        if parent is None:
            self._replace_unused(own_rows)
        self._make_room(own_rows)
        sequence = CachedSequence(request.request_id, self._rows.add(parent, own_rows), rows)
        self._sequences[request.request_id] = sequence
        return sequence

    def _grow(self, sequence: CachedSequence, rows: int) -> tuple[int, ...]:
        """The ids of the new rows."""
        if rows <= 0:
            return ()
        self._make_room(rows)
        sequence.tail = self._rows.grow(sequence.tail, rows)
        sequence.rows += rows
        return tuple(sequence.tail.ids[-rows:])

    def _unuse(self, end: Run) -> None:
        """One sequence or pin less uses the rows up to `end`, which may be those of sequences that had none to give."""
        self._rows.unuse(end)
        for sequence in self._without_rows:
            self._queue.push(sequence)
        self._without_rows.clear()

    def _rename(self, sequence: CachedSequence, owner: str | int) -> None:
        del self._sequences[sequence.owner]
        sequence.owner = owner
        self._sequences[owner] = sequence

    # Retained sequences.

    def _keep(self, request: Request, sequence: CachedSequence) -> None:
        """Retain a sequence for requests that begin alike, without the rows behind its tokens."""
        self._retain(request, sequence, is_doomed=False)
        needed = self.capacity.whole_shares(self.capacity.rows_for(self._index.length(sequence)))
        if needed < sequence.rows and not sequence.num_pins:
            self._truncate(sequence, needed)
        indexed = self._index.sequences[sequence]
        is_alone = self._rows.exclusive(sequence.tail) == sequence.rows
        if is_alone and not indexed.num_uses and indexed.length <= SHORT_TOKENS:
            self._unused.add(sequence, request.token_ids, request.sampling_params.cache_salt)
        self._make_room()

    def _doom(self, request: Request, sequence: CachedSequence) -> None:
        """Retain what others use of a pinned sequence, which cannot be found any more; evict the rest of its rows."""
        self._retain(request, sequence, is_doomed=True)
        self._index.discard(sequence)
        if unused := self._rows.unused(sequence.tail):
            self._shrink(sequence, sequence.rows - unused)

    def _retain(self, request: Request, sequence: CachedSequence, *, is_doomed: bool) -> None:
        """Turn the sequence of a request that does not run any more into a retained one."""
        self._changes.retained.append((request.request_id, self._num_keys))
        self._rename(sequence, self._num_keys)
        self._num_keys += 1
        self._num_retained += 1
        self._unuse(sequence.tail)
        sequence.is_doomed = is_doomed
        self._queue.push(sequence)
        self._queue.compact(self._num_retained)

    def _make_room(self, rows: int = 0) -> None:
        """Evict until so many rows are free, or nothing can be evicted."""
        while (missing := self._rows.used + self._rows.kept + rows - self.capacity.rows) > 0:
            sequence = self._first_to_evict()
            if sequence is None:
                return
            held = sequence.rows - self._rows.exclusive(sequence.tail)
            evicted = max(missing, self.capacity.rows // _EVICTED_SHARE)
            left = max(held, self.capacity.whole_shares(sequence.rows - evicted - self.capacity.share_rows + 1))
            if held < left < sequence.rows or (held < sequence.rows and sequence.num_pins):
                self._truncate(sequence, left)
            elif sequence.num_pins:
                self._truncate(sequence, sequence.rows - self._rows.unused(sequence.tail))
            else:  # nothing is left, or rows whose tokens are found through the others that hold them
                self._evict(sequence)

    def _replace_unused(self, rows: int) -> None:
        """Evict sequences that nobody has used, for a request without a hit that is about to take so many rows.

        Rows are scarce where too few are left for running requests to grow into.
        """
        limit = self.capacity.rows - self.capacity.rows // _GROWTH_SHARE - rows
        while sequence := self._unused.replace(is_scarce=self._rows.used + self._rows.kept > limit):
            self._evict(sequence)
            if self._rows.used + self._rows.kept <= limit:
                return

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

    def _first_to_evict(self) -> CachedSequence | None:
        """A pinned sequence with nothing to give leaves the queue until other requests use fewer rows."""
        while (sequence := self._queue.first()) is not None:
            if not sequence.num_pins or self._rows.unused(sequence.tail):
                return sequence
            self._queue.pop()
            self._without_rows.append(sequence)
        return None

    def _eviction_key(self, sequence: CachedSequence) -> tuple[int, ...] | None:
        """Rows of doomed sequences go first."""
        if sequence.is_doomed and sequence.num_pins:
            return ()
        indexed = self._index.sequences.get(sequence)
        return self._policy(indexed) if indexed and sequence.is_retained else None

    def _truncate(self, sequence: CachedSequence, rows: int) -> None:
        """Take the rows from `rows` on from a retained sequence, and their tokens from the index."""
        self._shrink(sequence, rows)
        if not sequence.is_doomed:
            self._index.truncate(sequence, self.capacity.tokens_within(rows))

    def _shrink(self, sequence: CachedSequence, rows: int) -> None:
        """Take the rows from `rows` on from a retained sequence. The index does not change."""
        assert isinstance(sequence.owner, int)
        self._counts["num_evicted_rows"] += sequence.rows - rows
        sequence.tail = self._rows.shrink(sequence.tail, sequence.rows - rows)
        sequence.rows = rows
        self._changes.evicted[sequence.owner] = rows

    def _evict(self, sequence: CachedSequence) -> None:
        assert isinstance(sequence.owner, int)
        self._counts["num_evicted_rows"] += self._rows.exclusive(sequence.tail)
        self._index.discard(sequence)
        self._unused.discard(sequence)
        self._rows.drop(sequence.tail)
        self._num_retained -= 1
        del self._sequences[sequence.owner]
        self._changes.evicted[sequence.owner] = 0
