"""Messages in shared memory to several processes: all of them, whole and in order, also where a reader is behind."""

import os
import random
from hashlib import blake2b

import pytest

from sarathi.executor.ranks.broadcast import _RING, Broadcast, Receiver, create_ring


def digest(messages: list[bytes]) -> bytes:
    found = blake2b()
    for each in messages:
        found.update(len(each).to_bytes(8, "little") + each)
    return found.digest()


def read_all(receiver: Receiver, count: int, answer: int) -> None:
    """In a process of its own: tell a hash of so many messages."""
    os.write(answer, digest([receiver.receive() for _ in range(count)]))
    os._exit(0)


@pytest.mark.parametrize("size", [1, 3])
def test_all_messages_reach_all_processes(size: int) -> None:
    """Short ones, those that cross the end of the ring, and some that are longer than it."""
    lengths = [random.choice([0, 1, 7, 8, 9, 300, 9000, 70_000]) for _ in range(300)] + [_RING + 5, 3 * _RING, 1]
    random.shuffle(lengths)
    messages = [random.randbytes(length) for length in lengths]
    ring, wakers, pipes = create_ring(size), [os.eventfd(0) for _ in range(size)], [os.pipe() for _ in range(size)]
    children = []
    for rank in range(size):
        if not (child := os.fork()):
            read_all(Receiver(ring, size, rank, wakers[rank]), len(messages), pipes[rank][1])
        children.append(child)
    broadcast = Broadcast(ring, wakers, limit_s=60)
    for each in messages:
        broadcast.send(each)
    assert [os.read(reader, 64) for reader, _ in pipes] == [digest(messages)] * size
    for child in children:
        os.waitpid(child, 0)
    for descriptor in (ring, *wakers, *(each for pipe in pipes for each in pipe)):
        os.close(descriptor)


def test_a_process_that_reads_nothing_is_told_once_the_ring_is_full() -> None:
    ring, wakers = create_ring(2), [os.eventfd(0), os.eventfd(0)]
    broadcast, reader = Broadcast(ring, wakers, limit_s=0.05), Receiver(ring, 2, 0, wakers[0])
    num_sent = 0
    with pytest.raises(OSError, match=r"a rank has read no message for 0\.05 s"):
        for _ in range(100):
            broadcast.send(b"x" * 100_000)
            num_sent += 1
            assert reader.receive() == b"x" * 100_000
    assert num_sent == _RING // 100_008
    for descriptor in (ring, *wakers):
        os.close(descriptor)
