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
import numpy
from numpy.lib.stride_tricks import as_strided
from vattention import VirtualKVCache
from vattention.arguments import open_device

def region(cache, index):
    return as_strided(numpy.from_dlpack(cache.regions()[index]).view("float16"), (4, 1024, 2, 32),
                      (cache.slot_bytes, 128, 64, 2))

def fault(case):
    cache = VirtualKVCache(num_layers=2, num_kv_heads=2, head_size=32, num_slots=4, max_tokens=1024,
                           dtype="float16", page_bytes=4096, budget_bytes=1 << 20, deferred_reclamation=False)
    slot = cache.alloc(40)
    cache.prepare([slot], [40])
    v = region(cache, 2)
    v[slot, :64] = 1
    token = {"past the mapped rows": 64}.get(case, 0)
    if case == "after free":
        cache.free(slot)
    if case == "after close":
        cache.close()
    if case == "another slot":
        slot = (slot + 1) % 4
    print(case, float(v[slot, token].sum()), flush=True)

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
        ({"device": "meta"}, ValueError, "'cpu', 'cuda'.*meta"),
        ({"device": "cuda:x"}, ValueError, "'cpu', 'cuda'.*cuda:x"),
        ({"device": None}, ValueError, "'cpu', 'cuda'.*None"),
        ({"num_slots": 1 << 70}, ValueError, r"num_slots must be at most 2\^62"),
        ({"head_size": 1 << 60, "num_kv_heads": 1 << 60}, ValueError, "bytes of a token"),
        ({"dtype": "float33"}, ValueError, "dtype is 'float33'.*bfloat16"),
        ({"dtype": float}, TypeError, "torch.bfloat16.*<class 'float'>"),
        ({"page_bytes": "64kb"}, TypeError, "page_bytes must be a number of bytes.*'64kb'"),
        ({"page_bytes": 0}, ValueError, "page_bytes must be at least 1, got 0"),
        ({"page_bytes": -4096}, ValueError, "page_bytes must be at least 1, got -4096"),
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


@pytest.mark.parametrize(
    "budget_bytes, error", [("1gb", TypeError), (1e9, TypeError), (True, TypeError), (1 << 63, ValueError)]
)
def test_budgets_are_numbers_of_bytes(budget_bytes: object, error: type[Exception]):
    with pytest.raises(error, match=r"budget_bytes.*(number of bytes|2\^62)"):
        VirtualKVCache(**OPTIONS, budget_bytes=budget_bytes)
    with make() as cache:
        for call in (cache.resize, cache.fill_pool):
            with pytest.raises(error, match=r"bytes.*(number of bytes|2\^62)"):
                call(budget_bytes)


def test_a_view_is_cut_to_what_is_prepared_and_safe_to_print():
    with make() as cache:
        slot = cache.alloc()
        assert [tuple(view.shape) for view in cache.view(slot, 1)] == [(0, 2, 32)] * 2
        cache.prepare([slot], [40])
        k, v = cache.view(slot, 1)
        assert k.shape == v.shape == (40, 2, 32)
        k.fill_(3)
        v.fill_(4)
        assert "3." in repr(k) and cache.layer(1)[0][slot, 39].eq(3).all() and cache.layer(1)[1][slot, 0].eq(4).all()
        cache.prepare([slot], [41])
        assert cache.view(slot, 1)[0].shape == (41, 2, 32) and k.shape == (40, 2, 32)
        for wrong, text in (((3, 0), "slot 3 is not allocated"), ((9, 0), "from 0 to 3"), ((slot, 2), "from 0 to 1")):
            with pytest.raises(ValueError, match=text):
                cache.view(*wrong)


def test_a_name_of_a_dtype_is_that_dtype():
    with make(dtype="bfloat16") as cache:
        assert cache.layer(0)[0].dtype == torch.bfloat16 and cache.token_bytes == 128


def test_a_cache_says_what_it_is():
    cache = make(megacache=True)
    assert repr(cache) == (
        "VirtualKVCache(2 layers x 2 heads x 32 torch.float16, megacache, 4 slots x 1024 tokens, pages of 4096 bytes)"
    )
    cache.close()
    assert repr(cache).endswith(", closed)")


REPORTED = """
import faulthandler, sys, numpy, vattention
from vattention import VirtualKVCache
faulthandler.enable()
vattention.report_faults()
vattention.report_faults()
cache = VirtualKVCache(num_layers=2, num_kv_heads=2, head_size=32, num_slots=4, max_tokens=1024,
                       dtype="float16", page_bytes=4096, budget_bytes=1 << 20)
cache.prepare([cache.alloc(), cache.alloc(), cache.alloc()], [1, 2, 40])
numpy.from_dlpack(cache.regions()[1])[2 * cache.slot_bytes + 70 * cache.token_bytes + 100]
"""


def test_a_fault_is_reported_with_region_slot_and_token_and_goes_on_to_the_next_handler():
    run = subprocess.run([sys.executable, "-c", REPORTED], capture_output=True, text=True)
    assert run.returncode == -signal.SIGSEGV
    ours, rest = run.stderr.split("\n", 1)
    assert (
        ours == "vattention: access to unprepared memory of a KV cache: region 1, slot 2, token 70 of max_tokens 1024"
    )
    assert rest.startswith("Fatal Python error: Segmentation fault")


WITHOUT_TORCH = """
import sys
import vattention
from vattention import VirtualKVCache
import numpy
with VirtualKVCache(num_layers=2, num_kv_heads=2, head_size=32, num_slots=4, max_tokens=1024, dtype="bfloat16",
                    page_bytes=4096, budget_bytes=1 << 20) as cache:
    slot = cache.alloc()
    slot = cache.alloc()
    cache.prepare([slot], [40])
    region = cache.regions()[3]
    assert region.__dlpack_device__() == (1, 0)
    data = numpy.from_dlpack(region)
    tokens = data[slot * cache.slot_bytes :][: 40 * cache.token_bytes]
    assert tokens.dtype == numpy.uint8 and tokens.sum() == 0
    tokens[:] = 1
    assert "torch" not in sys.modules
print("done")
"""


def test_regions_are_there_without_torch():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr


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
        for verb in (cache.free, cache.claim, cache.slot_state):
            for number in (17, -1, 1 << 70):
                with pytest.raises(ValueError, match="slot"):
                    verb(number)
            with pytest.raises(TypeError, match=r"slot must be an integer, got 1.5"):
                verb(1.5)
        for call in (cache.alloc, cache.map_ahead, lambda tokens: cache.share(slot, 3, tokens)):
            with pytest.raises(ValueError):
                call(1 << 70)
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
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads) and not failures
        cache.check_integrity()
