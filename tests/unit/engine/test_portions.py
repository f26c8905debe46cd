"""What of a prompt leaves when, and that a range under way stays as it is: without processes."""

import random
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk, NewRequest, Portion
from sarathi.sampling_params import SamplingParams
from sarathi.transfer.link import Link
from sarathi.transfer.portions import Portions
from sarathi.transfer.receiver import Receiver
from sarathi.transfer.sender import Sender
from sarathi.worker.cache_engine.base import CacheEngine, KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine

LAYERS, LENGTH = 3, 100
BACKENDS = ("sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb", "sdpa_paged_4")


def chunks_of(length: int, rng: random.Random) -> list[Chunk]:
    ends = sorted({*rng.sample(range(1, length), min(length - 1, rng.randint(0, 60))), length})
    return [Chunk("a", start, end - start, end == length, length) for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(("layers", "backend"), [(32, "fa_vattn"), (32, "fa_vattn_megacache"), (80, "fa_vattn")])
def test_a_prompt_is_sent_whole_once_and_in_few_ranges(layers: int, backend: str) -> None:
    rng = random.Random(random.randrange(2**31))
    each = 2 if "megacache" in backend else 2 * layers
    for length in (1, 2, 100, 8192, 131072):
        portions = Portions(backend, layers, max_ranges=64)
        portions.add(NewRequest("a", (1,) * length, SamplingParams()))
        chunks = enumerate(chunks_of(length, rng))
        sent = [portion for step_id, chunk in chunks for portion in portions.plan(step_id, [chunk])]
        assert [portion.first for portion in sent] == [0, *[portion.end for portion in sent[:-1]]]
        assert sent[-1].end == length and len(sent) * each <= max(64, each)
        assert portions.finish("a") == len(sent) and portions.finish("a") is None


def test_what_did_not_run_is_sent_later() -> None:
    portions = Portions("fa_vattn_megacache", 2, max_ranges=64)
    portions.add(NewRequest("a", (1,) * 30, SamplingParams()))
    first, second = Chunk("a", 0, 10, False, 30), Chunk("a", 10, 10, False, 30)
    assert portions.plan(0, [first, Chunk("b", 0, 5, True, 5)]) == (Portion("a", 0, 10),)
    portions.complete(0)
    portions.plan(1, [second])
    portions.roll_back(1)
    assert portions.plan(2, [second]) == (Portion("a", 10, 20),)
    assert portions.plan(3, [Chunk("a", 20, 10, True, 30)]) == (Portion("a", 20, 30),)
    assert portions.finish("a") == 3


def test_steps_behind_one_that_did_not_run_are_taken_back_with_it_and_later_ones_are_not() -> None:
    portions = Portions("fa_vattn_megacache", 2, max_ranges=64)
    portions.add(NewRequest("a", (1,) * 30, SamplingParams()))
    portions.plan(0, [Chunk("a", 0, 10, False, 30)])
    portions.plan(1, [Chunk("a", 10, 10, False, 30)])
    portions.roll_back(0)
    assert portions.plan(2, [Chunk("a", 0, 5, False, 30)]) == (Portion("a", 0, 5),)
    portions.roll_back(1)  # its result comes after step 2 was planned
    assert portions.plan(3, [Chunk("a", 5, 25, True, 30)]) == (Portion("a", 5, 30),)
    assert portions.finish("a") == 2


class Pair(Link):
    """Both ends in one process. What is sent leaves only when `deliver` is called."""

    def __init__(self) -> None:
        self._announced = deque[Any]()
        self._changed = threading.Condition()
        self.sent, self.received = deque[tuple[Tensor, threading.Event]](), deque[tuple[Tensor, threading.Event]]()

    def announce(self, message: Any) -> None:
        with self._changed:
            self._announced.append(message)
            self._changed.notify_all()

    def next_announcement(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._announced)
            return self._announced.popleft()

    def send(self, ranges: Sequence[Tensor]) -> list[threading.Event]:
        return self._start(ranges, self.sent)

    def receive(self, ranges: Sequence[Tensor]) -> list[threading.Event]:
        return self._start(ranges, self.received)

    def wait(self, transfers: Sequence[threading.Event]) -> None:
        for each in transfers:
            assert each.wait(60)

    def deliver(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self.sent) >= count and len(self.received) >= count)
        for _ in range(count):
            (source, left), (target, arrived) = self.sent.popleft(), self.received.popleft()
            target.copy_(source)
            left.set()
            arrived.set()

    def _start(self, ranges: Sequence[Tensor], queue: Any) -> list[threading.Event]:
        started = [(each, threading.Event()) for each in ranges]
        with self._changed:
            queue.extend(started)
            self._changed.notify_all()
        return [event for _, event in started]


def make_cache(backend: str) -> CacheEngine:
    spec = KVCacheSpec(LAYERS, 2, 8, torch.float32, max_num_seqs=2, max_model_len=256)
    cache = create_cache_engine(BackendSpec.parse(backend), spec, torch.device("cpu"), 2**20)
    blocks = tuple(range(LENGTH // 4)) if "paged" in backend else ()
    cache.prepare([Chunk("a", 0, LENGTH, True, LENGTH, blocks)])
    return cache


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_arrive_layer_by_layer_and_are_settled_before_their_memory_is_released(backend: str) -> None:
    source, target, link = make_cache(backend), make_cache(backend), Pair()
    calls: list[int] = []
    layers: list[Any] = [lambda *_, index=index: calls.append(index) for index in range(LAYERS)]
    sender, receiver = Sender(link, source, layers), Receiver(link, target)
    for ranges in source.ranges("a", 0, LENGTH):
        for tensor in ranges:
            tensor.copy_(torch.rand(tensor.shape))
    portions = [Portion("a", 0, 60), Portion("a", 60, LENGTH)]
    for portion in portions:
        sender.start([portion])
        for layer in layers:
            layer(None, None, None)
    assert calls == [*range(LAYERS)] * 2
    settled = threading.Thread(target=sender.settle, args=(["a"],))
    settled.start()
    count = sum(len(each) for portion in portions for each in source.ranges(*portion))
    link.deliver(count - 1)
    settled.join(timeout=0.05)
    assert settled.is_alive()  # one range is under way still
    link.deliver(1)
    settled.join(timeout=60)
    receiver.wait("a", 2)
    assert not settled.is_alive()
    for ours, theirs in zip(source.ranges("a", 0, LENGTH), target.ranges("a", 0, LENGTH), strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    for cache in (source, target):
        cache.close()


def test_a_prompt_is_there_when_all_of_its_portions_are() -> None:
    source, target, link = make_cache(BACKENDS[0]), make_cache(BACKENDS[0]), Pair()
    layers: list[Any] = [lambda *_: None] * LAYERS
    sender, receiver = Sender(link, source, layers), Receiver(link, target)
    waits = threading.Thread(target=receiver.wait, args=("a", 2))
    waits.start()
    for portion in (Portion("a", 0, 60), Portion("a", 60, LENGTH)):
        waits.join(timeout=0.05)
        assert waits.is_alive(), "it went on before the next portion was announced"
        sender.start([portion])
        for layer in layers:
            layer(None, None, None)
        link.deliver(sum(len(ranges) for ranges in source.ranges(*portion)))
    waits.join(timeout=60)
    assert not waits.is_alive()
    for cache in (source, target):
        cache.close()
