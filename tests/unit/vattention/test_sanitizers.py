"""Threads and forks driven from Python, over the native module built with sanitizers: a minute, in make test-all."""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[3]
FLAGS = {"thread": "-fsanitize=thread", "address": "-fsanitize=address,undefined"}
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 die_after_fork=0 suppressions=suppressions",
    "ASAN_OPTIONS": "detect_leaks=0 handle_segv=0",
}

THREADS = """
import os, random, sys, threading
import vattention
from vattention import NoFreeSlotError, OutOfMemoryError, VAttentionError, VirtualKVCache

assert vattention.__file__.startswith(os.environ["FOLDER"])
seed = random.randrange(1 << 30)
print("seed", seed, flush=True)
failures = []

def make(**changes):
    options = dict(num_layers=2, num_kv_heads=2, head_size=32, num_slots=12, max_tokens=1024, dtype="float16",
                   page_bytes=4096, budget_bytes=200 * 4 * 4096, reclaim_threshold=0.3)
    return VirtualKVCache(**{**options, **changes})

def serve(cache, rng, is_closing):
    try:
        for _ in range(60):
            try:
                slot = cache.alloc(rng.randrange(300))
            except NoFreeSlotError:
                continue
            length = rng.randrange(1, 300)
            try:
                cache.prepare([slot], [length])
                cache.prefetch([slot], [length + 40], lead_tokens=8)
                assert cache.slot_state(slot)[:2] == (True, length)
                other = cache.alloc()
                try:
                    shared = cache.share(slot, other, rng.randrange(length + 1))
                    cache.prepare([slot, other], [length + 33, shared + 20])
                finally:
                    cache.free(other)
            except (NoFreeSlotError, OutOfMemoryError):
                pass
            cache.free(slot)
    except VAttentionError as error:
        if not is_closing or "closed" not in str(error):
            failures.append(error)
    except BaseException as error:
        failures.append(error)

def administer(cache, rng, is_closing):
    try:
        for round in range(60):
            cache.map_ahead(rng.choice([0, 100]))
            cache.set_deferred_reclamation(bool(round % 2))
            try:
                cache.resize(rng.randrange(150, 220) * cache.row_bytes)
            except OutOfMemoryError:
                pass
            cache.fill_pool(rng.randrange(50) * cache.row_bytes)
            cache.stats(), cache.capacity_rows, cache.regions()[round % 4].__dlpack__()
            cache.reclaim_idle()
            cache.check_integrity()
    except VAttentionError as error:
        if not is_closing or "closed" not in str(error):
            failures.append(error)

def run(is_closing, number):
    cache = make()
    jobs = [serve] * 4 + [administer]
    threads = [threading.Thread(target=job, args=(cache, random.Random(seed + 10 * number + i), is_closing))
               for i, job in enumerate(jobs)]
    if is_closing:
        threads += [threading.Thread(target=cache.close)] * 1 + [threading.Thread(target=cache.close)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not is_closing:
        cache.check_integrity()
    cache.close()
    assert cache.stats().created_bytes == 0

for number in range(6):
    run(number % 2 == 1, number)
assert not failures, failures
print("done")
"""

FORKS = """
import os, random, sys, threading
from vattention import ForkError, VirtualKVCache

cache = VirtualKVCache(num_layers=2, num_kv_heads=2, head_size=32, num_slots=12, max_tokens=1024, dtype="float16",
                       page_bytes=4096, budget_bytes=200 * 4 * 4096)
stop = threading.Event()

def serve():
    while not stop.is_set():
        slot = cache.alloc(100)
        cache.prepare([slot], [100])
        cache.prefetch([slot], [200])
        cache.free(slot)

threads = [threading.Thread(target=serve) for _ in range(2)]
for thread in threads:
    thread.start()
for number in range(20):
    child = os.fork()
    if child == 0:
        try:
            cache.alloc()
            os._exit(1)
        except ForkError:
            pass
        cache.close()
        del cache
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, number
stop.set()
for thread in threads:
    thread.join()
cache.check_integrity()
cache.close()
print("done")
"""


@pytest.fixture(scope="module", params=list(FLAGS))
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Python finds the package over a module built with one sanitizer."""
    name = request.param
    compiler = shutil.which("g++")
    library = f"lib{'t' if name == 'thread' else 'a'}san.so"
    found = [_library(compiler, name) for name in (library, "libstdc++.so")] if compiler else []
    if not all(found) or not found:
        pytest.skip(f"this machine has no g++ with {library}")
    folder = tmp_path_factory.mktemp(name)
    shutil.copytree(
        ROOT / "vattention", folder / "vattention", ignore=shutil.ignore_patterns("_native*.so", "__pycache__")
    )
    module = folder / "vattention" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-g", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", FLAGS[name]]
    sources = sorted(glob(str(ROOT / "csrc/vattention/*.cpp")))
    subprocess.run([compiler, *flags, *includes, *sources, "-o", module, "-ldl", "-lpthread"], check=True)
    # Freeing a thread's storage in the dynamic loader is ordered by what the sanitizer does not see.
    (folder / "suppressions").write_text("race:_dl_deallocate_tls\n")
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    return {**os.environ, **OPTIONS, "PYTHONPATH": path, "LD_PRELOAD": ":".join(found), "FOLDER": str(folder)}


def _library(compiler: str, name: str) -> str:
    """The path of one of the compiler's libraries, or "" where it has none."""
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else ""


@pytest.mark.slow
@pytest.mark.parametrize("script", [THREADS, FORKS], ids=["threads", "forks"])
def test_nothing_is_found_in(script: str, sanitized: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=sanitized["FOLDER"],
        env=sanitized,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and run.stdout.endswith("done\n"), (
        f"{run.returncode}\n{run.stdout}\n{run.stderr[-8000:]}"
    )
    assert "Sanitizer" not in run.stderr, run.stderr[-8000:]
