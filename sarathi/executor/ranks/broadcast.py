"""Messages to all ranks of this machine: written once, into shared memory which has no name and ends with them.

A message is copied once however many ranks there are; each rank is woken by an eventfd of its own. Ranks may read at
different paces: the writer waits where the slowest is a whole ring behind.
"""

import mmap
import os
import time
from collections.abc import Sequence

_RING = 2**20  # bytes
_WORD = 8
_LONGEST_FRAME = _RING // 4  # bytes of a message that are written at once
_LOOK_S = 1e-3  # between looks of a writer at readers that are behind


class _Ring:
    """The shared memory: a word for each rank, how many bytes it has read so far, then frames.

    A frame is a word, 2 x length + 1 where it ends a message, and the bytes, up to a multiple of 8. It does not cross
    the end of the ring: a word of 0 there says that the next one is at the beginning.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        memory = memoryview(mmap.mmap(descriptor, size * _WORD + _RING))
        self._read = memory[: size * _WORD].cast("q")
        self._words, self._bytes = memory[size * _WORD :].cast("q"), memory[size * _WORD :]
        self._passed = 0  # bytes that this end has written or read

    def _skip(self, num_bytes: int) -> None:
        self._passed += num_bytes

    @property
    def _at(self) -> int:
        return self._passed % _RING


class Broadcast(_Ring):
    """The executor's end."""

    def __init__(self, descriptor: int, wakers: Sequence[int], limit_s: float) -> None:
        """descriptor: of `create_ring`. wakers: an eventfd a rank. limit_s: for a rank to read what is in its way."""
        super().__init__(descriptor, len(wakers))
        self._wakers, self._limit_s = wakers, limit_s

    def send(self, message: bytes) -> None:
        """Raises OSError where a rank has not read for limit_s, and there is no more room."""
        for start in range(0, max(len(message), 1), _LONGEST_FRAME):
            end = min(start + _LONGEST_FRAME, len(message))
            self._write(message[start:end], end == len(message))
            for waker in self._wakers:
                os.eventfd_write(waker, 1)

    def _write(self, frame: bytes, is_last: bool) -> None:
        size = _WORD + _aligned(len(frame))
        if self._at + size > _RING:
            self._wait_for_room(_RING - self._at)
            self._words[self._at // _WORD] = 0
            self._skip(_RING - self._at)
        self._wait_for_room(size)
        first = self._at + _WORD
        self._bytes[first : first + len(frame)] = frame
        self._words[self._at // _WORD] = 2 * len(frame) + is_last
        self._skip(size)

    def _wait_for_room(self, num_bytes: int) -> None:
        deadline_s = time.monotonic() + self._limit_s
        while self._passed + num_bytes - min(self._read) > _RING:
            if time.monotonic() > deadline_s:
                raise OSError(f"a rank has read no message for {self._limit_s:g} s")
            time.sleep(_LOOK_S)


class Receiver(_Ring):
    """A rank's end."""

    def __init__(self, descriptor: int, size: int, rank: int, waker: int) -> None:
        """descriptor, waker: inherited from the executor's process. size: ranks."""
        super().__init__(descriptor, size)
        self._rank, self._waker = rank, waker
        self._num_frames = 0  # that are there and not read

    def receive(self) -> bytes:
        """The next message; waits for it."""
        message, is_last = b"", False
        while not is_last:
            frame, is_last = self._next_frame()
            message += frame
        return message

    def _next_frame(self) -> tuple[bytes, bool]:
        while not self._num_frames:
            self._num_frames = os.eventfd_read(self._waker)
        self._num_frames -= 1
        if not (word := self._words[self._at // _WORD]):
            self._skip(_RING - self._at)
            word = self._words[self._at // _WORD]
        length, first = word // 2, self._at + _WORD
        frame = bytes(self._bytes[first : first + length])
        self._skip(_WORD + _aligned(length))
        self._read[self._rank] = self._passed
        return frame, bool(word % 2)


def create_ring(size: int) -> int:
    """A descriptor of memory for so many ranks."""
    descriptor = os.memfd_create("sarathi-messages")
    os.ftruncate(descriptor, size * _WORD + _RING)
    return descriptor


def _aligned(length: int) -> int:
    return -(-length // _WORD) * _WORD
