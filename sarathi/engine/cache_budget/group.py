"""A group of one user's processes that share a total of memory; they communicate through files.

Each member locks its own file while it lives. The kernel releases the lock when the member ends, for whatever reason;
the others then take its share. A group lock, which is only tried and never awaited, protects all changes.
"""

import fcntl
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sarathi.engine.cache_budget.division import Claim, Holding, allowance

_RECORD = struct.Struct("<QQQQd")  # total, held, wish, need, since
_JOIN_TIMEOUT_S = 10.0


class BudgetGroup:
    """A membership in the group. It ends with the process, or with `leave`."""

    def __init__(self, folder: Path, total_bytes: int) -> None:
        """ValueError if the present members share another total, TimeoutError if a stopped member holds the group's
        lock."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._total = folder, total_bytes
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._file, self._path = -1, folder
        deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
        while not self._try_to_join():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"a member of the budget group at {folder} holds its lock and makes no progress")
            time.sleep(0.01)

    def exchange(self, claim: Claim, held: int) -> int:
        """Publish this member's claim and return the bytes that it may hold. It counts as holding the larger number.

        held: bytes that may be in use now; returned unchanged if another member has the group's lock.
        """
        with self._locked() as is_locked:
            if not is_locked:
                return held
            own = Holding(claim, held)
            allowed = allowance(self._total, own, [holding for holding, _ in self._others()])
            self._write(own._replace(held=max(held, allowed)))
        return allowed

    def leave(self) -> None:
        """End the membership. Idempotent."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            os.close(self._lock)
            self._file = -1

    def _try_to_join(self) -> bool:
        with self._locked() as is_locked:
            if is_locked:
                self._check_total()
                self._file, name = tempfile.mkstemp(prefix="member-", dir=self._folder)
                self._path = Path(name)
                fcntl.flock(self._file, fcntl.LOCK_EX)
                self._write(Holding(Claim(), 0))
        return is_locked

    def _check_total(self) -> None:
        for _, total in self._others():
            if total != self._total:
                raise ValueError(
                    f"memory_bytes is {self._total}: the other members of this kv_budget_group share {total}"
                )

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Try to take the group's lock; yields whether it was taken."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _others(self) -> list[tuple[Holding, int]]:
        """The living members with their totals. Removes the files of members that have ended."""
        found = []
        for path in self._folder.glob("member-*"):
            if path != self._path:
                with suppress(FileNotFoundError):
                    found += _read(path)
        return found

    def _write(self, own: Holding) -> None:
        claim, held = own
        os.pwrite(self._file, _RECORD.pack(self._total, held, claim.wish, claim.need, claim.since_s), 0)


def _read(path: Path) -> list[tuple[Holding, int]]:
    """A member's holding and total; an empty list, and the file is removed, if the member has ended."""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        total, held, wish, need, since_s = _RECORD.unpack(os.pread(file, _RECORD.size, 0))
        return [(Holding(Claim(wish, need, since_s), held), total)]
    finally:
        os.close(file)
    path.unlink()
    return []
