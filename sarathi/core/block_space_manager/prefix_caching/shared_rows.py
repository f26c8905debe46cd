"""Rows that several sequences hold, counted once.

The rows of all sequences form a tree: sequences that share a prefix share the path from the root, and each has rows of
its own behind it. A run is a stretch of rows without a branch. A sequence is named by its last run.

    run of 8 rows ---- run of 3 rows        sequence a: 11 rows
                  \\--- run of 1 row         sequence b: 9 rows; 12 distinct rows in all
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

from sarathi.core.block_space_manager.base import BlockSpaceError


class RowPool(Protocol):
    """Where ids of rows come from, if rows have ids."""

    def take(self, count: int) -> list[int]:
        """Ids of free rows."""

    def put(self, ids: list[int]) -> None:
        """Return ids."""

    def clear(self) -> None:
        """Take every id back."""

    def resize(self, rows: int) -> None:
        """Have at least so many ids."""


class NoIds:
    """Rows of contiguous memory have no ids: the native cache decides which page is where."""

    def take(self, count: int) -> list[int]:
        return []

    def put(self, ids: list[int]) -> None:
        """Nothing to return."""

    def clear(self) -> None:
        """Nothing to take back."""

    def resize(self, rows: int) -> None:
        """No ids."""


@dataclass(eq=False, slots=True)
class Run:
    """holders: sequences that hold it. users: those of them that run, and pins. ids: of its rows, where they have any.

    A run that a pin alone keeps has users and no holders.
    """

    parent: Run | None
    rows: int
    holders: int = 1
    users: int = 1
    ids: list[int] = field(default_factory=list)

    def path(self) -> Iterator[Run]:
        """This run and those before it, up to the root."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.parent

    def path_ids(self) -> tuple[int, ...]:
        """Ids of all rows up to the end of this run, in order."""
        runs = [run.ids for run in self.path()]
        return tuple([id for ids in reversed(runs) for id in ids])


class SharedRows:
    """used: distinct rows of running and pinned sequences. kept: those that only other sequences hold."""

    def __init__(self, pool: RowPool) -> None:
        self.used = self.kept = 0
        self._pool = pool

    def add(self, parent: Run | None, rows: int) -> Run:
        """The last run of a new running sequence: `rows` rows of its own behind those that end with `parent`."""
        if parent is not None:
            for run in parent.path():
                run.holders += 1
            self.use(parent)
        self.used += rows
        return Run(parent, rows, ids=self._pool.take(rows))

    def grow(self, tail: Run, rows: int) -> Run:
        """Append rows to a running sequence; returns its last run."""
        self.used += rows
        ids = self._pool.take(rows)
        if tail.holders > 1:
            return Run(tail, rows, ids=ids)
        tail.rows += rows
        tail.ids += ids
        return tail

    def shrink(self, tail: Run, rows: int) -> Run:
        """Remove the last rows of a sequence, fewer than it has and none that is used; returns its last run."""
        end = self.split(tail, _sum_rows(tail.path()) - rows)
        self.drop(tail, end)
        return end

    def use(self, end: Run) -> None:
        """Count the rows up to `end` as used by one more."""
        for run in end.path():
            if not run.users:
                self.used += run.rows
                self.kept -= run.rows
            run.users += 1

    def unuse(self, end: Run) -> None:
        """Undo `use`."""
        for run in end.path():
            run.users -= 1
            if not run.users:
                self.used -= run.rows
                self.kept += run.rows
                self._free_unheld(run)

    def drop(self, tail: Run, end: Run | None = None) -> None:
        """Remove the rows behind `end` of a sequence that does not run; all of them where it is None."""
        for run in tail.path():
            if run is end:
                break
            run.holders -= 1
            if not run.users:
                self._free_unheld(run)

    def split(self, tail: Run, rows: int) -> Run:
        """The run that ends with the sequence's first `rows` rows, cut where necessary."""
        end = _sum_rows(tail.path())
        for run in tail.path():
            if end == rows:
                return run
            end -= run.rows
            if end < rows:
                return _cut(run, rows - end)
        raise BlockSpaceError(f"a sequence has no first {rows} rows")

    def kept_within(self, tail: Run, rows: int) -> int:
        """Of a sequence's first `rows` rows, those that are not used."""
        end = _sum_rows(tail.path())
        kept = 0
        for run in tail.path():
            begin = end - run.rows
            if not run.users:
                kept += max(0, min(end, rows) - begin)
            end = begin
        return kept

    def exclusive(self, tail: Run) -> int:
        """Rows at the end of a sequence that nobody else holds or uses."""
        return _sum_rows(takewhile(lambda run: run.holders == 1 and not run.users, tail.path()))

    def unused(self, tail: Run) -> int:
        """Rows at the end of a sequence that nobody uses; others may hold them."""
        return _sum_rows(takewhile(lambda run: not run.users, tail.path()))

    def check_integrity(self, ends: Iterable[tuple[Run, bool, bool]]) -> None:
        """Raise BlockSpaceError unless counts agree with `ends`: (last run, whether it uses, whether it holds)."""
        users: Counter[Run] = Counter()
        holders: Counter[Run] = Counter()
        for end, uses, holds in ends:
            users.update(end.path() if uses else ())
            holders.update(end.path() if holds else ())
        runs = {*users, *holders}
        for run in runs:
            if (
                (run.users, run.holders) != (users[run], holders[run])
                or run.rows < 1
                or len(run.ids) not in (0, run.rows)
            ):
                raise BlockSpaceError(
                    f"{run.users} users and {run.holders} holders of a run: {users[run]}, {holders[run]}"
                )
        used = sum(run.rows for run in runs if run.users)
        kept = sum(run.rows for run in runs if not run.users)
        ids = [id for run in runs for id in run.ids]
        if (used, kept) != (self.used, self.kept) or len(set(ids)) < len(ids):
            raise BlockSpaceError(f"{self.used} rows are counted as used and {self.kept} as kept: {used} and {kept}")

    def _free_unheld(self, run: Run) -> None:
        """Free the rows of a run that nobody uses, where no sequence holds it either."""
        if not run.holders:
            self.kept -= run.rows
            self._pool.put(run.ids)


def _sum_rows(runs: Iterable[Run]) -> int:
    return sum(run.rows for run in runs)


def _cut(run: Run, rows: int) -> Run:
    """Divide a run after `rows` rows; returns the part before, which every sequence through `run` holds too."""
    upper = Run(run.parent, rows, run.holders, run.users, run.ids[:rows])
    run.parent = upper
    run.rows -= rows
    del run.ids[:rows]
    return upper
