"""A forked process and the cache of its parent: calls are refused, memory is out of reach, exits are clean."""

import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, os, signal, sys
import numpy
from numpy.lib.stride_tricks import as_strided
from vattention import ForkError, VirtualKVCache

def make():
    return VirtualKVCache(num_layers=2, num_kv_heads=2, head_size=32, num_slots=4, max_tokens=1024,
                          dtype="float16", page_bytes=4096, budget_bytes=1 << 20)

def region(cache, index):
    return as_strided(numpy.from_dlpack(cache.regions()[index]).view("float16"), (4, 1024, 2, 32),
                      (cache.slot_bytes, 128, 64, 2))

def in_child(name, act):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            print(name, act())
        except ForkError as error:
            print(name, type(error).__name__, "'spawn'" in str(error))
        sys.exit(0)  # with all finalizers
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(name, "exit", status, flush=True)

def serve(queue):
    with make() as own:
        slot = own.alloc()
        own.prepare([slot], [40])
        region(own, 0)[slot, :40] = 3
        queue.put(float(region(own, 0)[slot, :40].sum(dtype="float32")))

if __name__ == "__main__":
    cache = make()
    slot = cache.alloc()
    cache.prepare([slot], [500])
    k = region(cache, 1)
    k[slot, :500] = 7
    cache.prefetch([slot], [900])
    in_child("alloc", lambda: cache.alloc())
    in_child("prepare", lambda: cache.prepare([slot], [600]))
    in_child("free", lambda: cache.free(slot))
    in_child("stats", lambda: cache.stats())
    in_child("close", lambda: cache.close())
    in_child("nothing", lambda: None)
    in_child("read", lambda: k[slot, 0].sum())
    in_child("write", lambda: k[slot, :500].fill(9))
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=serve, args=(queue,))
        process.start()
        print(method, queue.get(timeout=60))
        process.join()
        print(method, "exit", process.exitcode, flush=True)
    assert (k[slot, :500] == 7).all()
    cache.check_integrity()
    cache.prepare([slot], [1000])
    cache.close()
    print("parent is whole")
"""


@pytest.mark.timeout(180)
def test_a_forked_process_neither_uses_nor_changes_its_parents_cache(tmp_path) -> None:
    script = tmp_path / "forks.py"
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stdout + run.stderr
    refused = [
        line for call in ("alloc", "prepare", "free", "stats") for line in (f"{call} ForkError True", f"{call} exit 0")
    ]
    assert run.stdout.splitlines() == [
        *refused,
        "close None",
        "close exit 0",
        "nothing None",
        "nothing exit 0",
        "read exit -11",
        "write exit -11",
        f"fork {float(40 * 64 * 3)}",
        "fork exit 0",
        f"spawn {float(40 * 64 * 3)}",
        "spawn exit 0",
        "parent is whole",
    ]
