"""Shared memory of an executor's processes: answers to `prepare`, and heartbeats."""

import mmap
import os
import time

_WORD = 8  # bytes
_ROWS = 2**40  # a word is a step's number times this, plus 0 or the available rows and 1
_BUSY_POLLS = 200  # of the other ranks' answers before this rank sleeps between polls
_POLL_INTERVAL_S = 5e-5


class Board:
    """Two answer words and one heartbeat word per rank. The memory is anonymous: it is freed with the processes.

    A rank alternates between its two answer words: it overwrites one only after every rank has read it.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        """descriptor: of `create`, inherited by every rank. size: ranks."""
        self._size, self._memory = size, mmap.mmap(descriptor, 3 * size * _WORD)
        self._words = memoryview(self._memory).cast("q")
        self._num_answers = 0

    @staticmethod
    def create(size: int) -> int:
        """File descriptor of the memory for `size` ranks."""
        descriptor = os.memfd_create("sarathi-ranks")
        os.ftruncate(descriptor, 3 * size * _WORD)
        return descriptor

    def beat(self, rank: int) -> None:
        """Record a rank's heartbeat."""
        self._words[2 * self._size + rank] = time.monotonic_ns()

    def silence_s(self, rank: int) -> float:
        """Seconds since a rank's last `beat`."""
        return (time.monotonic_ns() - self._words[2 * self._size + rank]) / 1e9

    def agree(self, rank: int, available_rows: int | None) -> int | None:
        """Publish this rank's answer and wait for the others. None if all are None, else the minimum number of rows."""
        self._num_answers += 1
        first = self._num_answers % 2 * self._size
        self._words[first + rank] = self._num_answers * _ROWS + (0 if available_rows is None else available_rows + 1)
        answers = [self._answer(first + other) for other in range(self._size)]
        short = [answer - 1 for answer in answers if answer]
        return min(short) if short else None

    def _answer(self, index: int) -> int:
        polls = 0
        while (word := self._words[index]) // _ROWS != self._num_answers:
            polls += 1
            time.sleep(0 if polls < _BUSY_POLLS else _POLL_INTERVAL_S)
        return word % _ROWS
