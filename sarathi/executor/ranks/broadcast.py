"""Broadcasts messages to all ranks on this machine through a ring buffer in anonymous shared memory.

A message is written once for all ranks; an eventfd per rank wakes its reader. Ranks may read at different paces: the
writer waits when the slowest is a whole ring behind.
"""

import mmap
import os
import time
from collections.abc import Sequence

_RING = 2**20  # bytes
_WORD = 8
_LONGEST_FRAME = _RING // 4  # bytes; longer messages are split
_POLL_INTERVAL_S = 1e-3  # of the writer, while readers are behind


class _Ring:
    """The shared memory: one word per rank (bytes read so far), then frames.

    A frame is one word (2 x length, plus 1 for the last frame of a message) and its bytes, padded to a multiple of 8.
    Frames do not wrap around: a word of 0 means that the next frame is at the start of the ring.
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
        """descriptor: of `create_ring`. wakers: one eventfd per rank. limit_s: timeout for a rank to make room."""
        super().__init__(descriptor, len(wakers))
        self._wakers, self._limit_s = wakers, limit_s

    def send(self, message: bytes) -> None:
        """Raises OSError if the ring is full and a rank has not read for limit_s."""
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
            time.sleep(_POLL_INTERVAL_S)


class Receiver(_Ring):
    """A rank's end."""

    def __init__(self, descriptor: int, size: int, rank: int, waker: int) -> None:
        """descriptor, waker: inherited from the executor's process. size: ranks."""
        super().__init__(descriptor, size)
        self._rank, self._waker = rank, waker
        self._num_frames = 0  # written but not read

    def receive(self) -> bytes:
        """Wait for the next message."""
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
    """File descriptor of the memory for `size` ranks."""
    descriptor = os.memfd_create("sarathi-messages")
    os.ftruncate(descriptor, size * _WORD + _RING)
    return descriptor


def _aligned(length: int) -> int:
    return -(-length // _WORD) * _WORD
