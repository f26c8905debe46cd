"""Shared memory of the processes of an executor: answers to `prepare`, and signs of life."""

import mmap
import os
import time

_WORD = 8  # bytes
_ROWS = 2**40  # a word is a step's number times this, plus 0 or the available rows and 1
_EAGER_LOOKS = 200  # at the other ranks' answers before this one sleeps between looks
_SLEEP_S = 5e-5


class Board:
    """One word an answer and one a sign of life, for each rank. The memory has no name: it ends with the processes.

    Two answers of a rank are kept: it gives the next but one only when every rank has read the first.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        """descriptor: of `create`, inherited by every rank. size: ranks."""
        self._size, self._memory = size, mmap.mmap(descriptor, 3 * size * _WORD)
        self._words = memoryview(self._memory).cast("q")
        self._num_answers = 0

    @staticmethod
    def create(size: int) -> int:
        """A descriptor of memory for so many ranks."""
        descriptor = os.memfd_create("sarathi-ranks")
        os.ftruncate(descriptor, 3 * size * _WORD)
        return descriptor

    def beat(self, rank: int) -> None:
        """Say that a rank's process runs."""
        self._words[2 * self._size + rank] = time.monotonic_ns()

    def silence_s(self, rank: int) -> float:
        """Seconds since a rank's last `beat`."""
        return (time.monotonic_ns() - self._words[2 * self._size + rank]) / 1e9

    def agree(self, rank: int, available_rows: int | None) -> int | None:
        """Give this rank's answer and wait for the others': None where all are None, else the least number of rows."""
        self._num_answers += 1
        first = self._num_answers % 2 * self._size
        self._words[first + rank] = self._num_answers * _ROWS + (0 if available_rows is None else available_rows + 1)
        answers = [self._answer(first + other) for other in range(self._size)]
        short = [answer - 1 for answer in answers if answer]
        return min(short) if short else None

    def _answer(self, index: int) -> int:
        looks = 0
        while (word := self._words[index]) // _ROWS != self._num_answers:
            looks += 1
            time.sleep(0 if looks < _EAGER_LOOKS else _SLEEP_S)
        return word % _ROWS
