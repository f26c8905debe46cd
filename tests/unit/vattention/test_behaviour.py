"""What the class promises its users on the host device: faults, errors, slots, tensors, threads."""

import gc
import pickle
import signal
import subprocess
import sys
import threading

import pytest
import torch

import vattention
from vattention import DeviceError, NoFreeSlotError, OutOfMemoryError, VirtualKVCache

PAGE = 4096
OPTIONS = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "head_size": 32,
    "num_slots": 4,
    "max_tokens": 1024,
    "dtype": torch.float16,
    "page_bytes": PAGE,
}  # a token is 128 bytes in a region, a row 32 tokens, a slot 32 rows


def make(rows: int = 64, **changes) -> VirtualKVCache:
    return VirtualKVCache(**{**OPTIONS, **changes}, budget_bytes=rows * 4 * PAGE)


FAULTS = """
import os
from vattention import VirtualKVCache
from vattention.kv_cache import open_device
import torch

def fault(case):
    cache = VirtualKVCache(num_layers=2, num_kv_heads=2, head_size=32, num_slots=4, max_tokens=1024,
                           dtype=torch.float16, page_bytes=4096, budget_bytes=1 << 20, deferred_reclamation=False)
    slot = cache.alloc(40)
    cache.prepare([slot], [40])
    k, v = cache.layer(0)
    v[slot, :64] = 1
    token = {"past the mapped rows": 64}.get(case, 0)
    if case == "after free":
        cache.free(slot)
    if case == "after close":
        cache.close()
    if case == "another slot":
        slot = (slot + 1) % 4
    print(case, v[slot, token].sum().item(), flush=True)

for case in ["nothing", "past the mapped rows", "after free", "after close", "another slot"]:
    child = os.fork()  # no thread runs yet
    if child == 0:
        fault(case)
        os._exit(0)
    print(f"{case}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
open_device("cpu")
print("driver loaded:", "libcuda.so.1" in open("/proc/self/maps").read())
"""


def test_reading_what_is_not_mapped_faults_and_the_host_needs_no_driver():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    segv = -signal.SIGSEGV
    assert run.stdout.splitlines() == [
        "nothing 64.0",
        "nothing: 0",
        f"past the mapped rows: {segv}",
        f"after free: {segv}",
        f"after close: {segv}",
        f"another slot: {segv}",
        "driver loaded: False",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_driver_is_a_clear_error():
    with pytest.raises(DeviceError, match=r"no NVIDIA driver|cuInit|no CUDA device"):
        make(device="cuda", page_bytes=None)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"page_bytes": 6000}, ValueError, "granularity of 4096.*6000"),
        ({"page_bytes": 4096, "head_size": 4096}, ValueError, "4096 bytes is smaller than one token.*16384"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"num_slots": -3}, ValueError, "num_slots.*-3"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens.*1.5"),
        ({"reclaim_threshold": 1.5}, ValueError, "reclaim_threshold.*1.5"),
        ({"device": "meta"}, ValueError, "cpu or cuda.*meta"),
        ({"num_slots": 1 << 40, "max_tokens": 1 << 40}, ValueError, "address space"),
        ({"num_slots": 1 << 20, "max_tokens": 1 << 20}, DeviceError, "1048576 slots of .*: mmap reserving .* bytes"),
    ],
)
def test_wrong_sizes_are_named_with_their_numbers(changes: dict, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        make(**changes)


def test_a_budget_below_one_row_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"4 regions x 4096 bytes a page = 16384"):
        VirtualKVCache(**OPTIONS, budget_bytes=16383)


def test_wrong_calls_change_nothing():
    with make() as cache:
        slot = cache.alloc()
        for slots, tokens, error in [
            ([slot], [1025], ValueError),
            ([slot], [-1], ValueError),
            ([slot, 3], [10, 10], ValueError),  # not allocated
            ([99], [1], ValueError),
            ([slot], [1, 2], ValueError),
            ([slot], ["x"], TypeError),
            (5, [1], TypeError),
            ([slot], [1 << 70], ValueError),
            ([1 << 70], [1], ValueError),
        ]:
            with pytest.raises(error):
                cache.prepare(slots, tokens)
        for verb in (cache.free, cache.claim):
            with pytest.raises(ValueError):
                verb(17)
        with pytest.raises(ValueError, match="already in use"):
            cache.claim(slot)
        for tokens in (-1, 1025, 1 << 57):  # the last times the bytes of a token is 0 in 64 bits
            with pytest.raises(ValueError, match=f"tokens is {tokens}: it must be from 0 to 1024"):
                cache.rows_for(tokens)
        with pytest.raises(ValueError, match="max_tokens = 1024, got 1025"):
            cache.alloc(1025)
        with pytest.raises(ValueError, match="layer"):
            cache.layer(2)
        assert cache.slot_state(slot) == (True, 0, 0)
        cache.check_integrity()


def test_exhaustion_is_an_error_with_both_sums_and_nothing_mapped():
    with make(rows=10) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.prepare([a], [5 * 32])
        with pytest.raises(OutOfMemoryError) as caught:
            cache.prepare([a, b], [6 * 32, 5 * 32])
        assert (caught.value.needed, caught.value.available) == (11, 10)
        assert isinstance(caught.value, MemoryError)
        assert cache.slot_state(a) == (True, 160, 5) and cache.slot_state(b) == (True, 0, 0)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.needed, again.available, str(again)) == (11, 10, str(caught.value))
        cache.prepare([a, b], [5 * 32, 5 * 32])


def test_slots_run_out_and_come_back():
    with make() as cache:
        slots = [cache.alloc() for _ in range(4)]
        assert sorted(slots) == [0, 1, 2, 3]
        with pytest.raises(NoFreeSlotError, match="4 slots"):
            cache.alloc()
        cache.free(slots[2])
        assert cache.alloc() == slots[2]


def test_best_fit_replaces_an_empty_first_candidate():
    with make() as cache:
        slots = [cache.alloc() for _ in range(3)]
        cache.prepare(slots[1:], [4 * 32, 16 * 32])
        for slot in slots:
            cache.free(slot)
        assert cache.alloc(16 * 32) == slots[2]
        assert cache.alloc(5 * 32) == slots[1]


def test_tensors_outlive_the_cache_without_its_memory():
    cache = make()
    k, _ = cache.layer(0)
    cache.close()
    cache.close()
    assert cache.stats().created_bytes == 0
    for call in (cache.alloc, cache.wait, cache.check_integrity, cache.tensors):
        with pytest.raises((vattention.VAttentionError, ValueError), match="closed"):
            call()
    del cache
    gc.collect()
    assert k.shape == (4, 1024, 2, 32)


def test_threads_and_the_worker_do_not_deadlock_on_the_gil():
    failures = []

    def serve(cache: VirtualKVCache) -> None:
        try:
            for i in range(60):
                slot = cache.alloc(i)
                cache.prepare([slot], [i])
                cache.prefetch([slot], [i + 40])
                cache.stats()
                cache.free(slot)
        except Exception as error:
            failures.append(error)

    with make(rows=200, reclaim_threshold=0.9) as cache:
        threads = [threading.Thread(target=serve, args=(cache,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads) and not failures
        cache.check_integrity()
