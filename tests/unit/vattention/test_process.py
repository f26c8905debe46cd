"""What the process gives or denies the library: interpreters, file descriptors, memory, lists that change."""

import subprocess
import sys

import pytest
import torch

from vattention import VirtualKVCache


def make(**changes) -> VirtualKVCache:
    options = {
        "num_layers": 2, "num_kv_heads": 2, "head_size": 32, "num_slots": 4, "max_tokens": 1024,
        "dtype": torch.float16, "page_bytes": 4096, "budget_bytes": 1 << 20,
    }  # fmt: skip
    return VirtualKVCache(**{**options, **changes})


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


SUB_INTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
run = getattr(interpreters, "exec", None) or interpreters.run_string
try:
    failure = run(interpreters.create(), "import vattention")
except Exception as error:
    failure = error
print(failure)
"""


def test_a_sub_interpreter_is_refused_by_name():
    assert "main interpreter only" in run(SUB_INTERPRETER)


NO_DESCRIPTORS = """
import os, resource
from vattention import OutOfMemoryError, VirtualKVCache
cache = VirtualKVCache(num_layers=30, num_kv_heads=3, head_size=64, num_slots=700, max_tokens=8192, page_bytes=4096,
                       dtype="float32", budget_bytes=700 * 60 * 4096)
limit = int(open("/proc/sys/vm/max_map_count").read())
resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    os.dup(0)
    raise SystemExit("there are descriptors left")
except OSError:
    pass
if limit > 70_000:
    raise SystemExit(0)
slots = []
try:
    for _ in range(700):
        slots.append(cache.alloc())
        cache.prepare(slots[-1:], [1])
except OutOfMemoryError as error:
    assert "vm.max_map_count" in str(error)
    assert sum(1 for _ in range(len(slots))) < 700
else:
    raise SystemExit("the limit of areas was not seen")
cache.check_integrity()
"""


def test_the_limit_of_areas_is_seen_without_free_file_descriptors():
    run(NO_DESCRIPTORS)


NO_MEMORY = """
import resource, numpy
from vattention import VirtualKVCache
cache = VirtualKVCache(num_layers=2, num_kv_heads=2, head_size=32, num_slots=4, max_tokens=1024, page_bytes=4096,
                       dtype="float16", budget_bytes=1 << 60)
slot = cache.alloc()
cache.prepare([slot], [500])
tokens = numpy.from_dlpack(cache.regions()[0])[slot * cache.slot_bytes :][: 500 * cache.token_bytes]
tokens[:] = 7
used = int(open("/proc/self/statm").read().split()[0]) * 4096
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
try:
    cache.fill_pool(1 << 50)
    raise SystemExit("a pool of 2^50 bytes in 256 MB")
except MemoryError:
    pass
cache.check_integrity()
cache.prepare([slot], [1000])
assert (tokens == 7).all()
resource.setrlimit(resource.RLIMIT_AS, limits)
cache.fill_pool(1 << 20)
cache.prepare([cache.alloc()], [1024])
cache.check_integrity()
cache.close()
assert cache.stats().created_bytes == 0
print("whole")
"""


def test_a_pool_beyond_the_address_space_is_a_memory_error_and_leaves_all_usable():
    assert run(NO_MEMORY) == "whole"


def test_an_index_that_changes_the_lists_is_read_from_a_snapshot():
    with make() as cache:
        slot = cache.alloc()
        slots: list = []
        tokens: list = []

        class Clearing:
            def __index__(self) -> int:
                slots.clear()
                tokens.clear()
                return slot

        for call in (cache.prepare, cache.prefetch):
            slots[:] = [Clearing(), slot, slot]
            tokens[:] = [10, 20, 30]
            call(slots, tokens)
        assert cache.slot_state(slot)[1] == 30
        cache.check_integrity()


@pytest.mark.parametrize("page_bytes", [2**64 - 4096, 2**63, 2**62 + 4096])
def test_page_sizes_that_wrap_are_refused(page_bytes: int):
    with pytest.raises(ValueError, match="address space"):
        make(page_bytes=page_bytes)
