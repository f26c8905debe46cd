"""Measure moving a request's KV cache to another device, as ranges of a slot and as 16-token blocks: transfer.csv.

    python scripts/benchmark_transfer.py --device cuda --output DIR     # from cuda:0 to cuda:1, in one process
    python scripts/benchmark_transfer.py --device cpu --output DIR

Records number of ranges and bandwidth for each layout and length, compared with one contiguous copy of equal size.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sarathi.benchmark.config.program import positive
from sarathi.benchmark.records import Record, Table
from sarathi.config.backend import BackendSpec
from sarathi.entrypoints.script import run_script
from sarathi.messages import Chunk
from sarathi.worker.cache_engine.base import KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine

LAYERS, KV_HEADS, HEAD_SIZE = 32, 8, 128  # of Llama-3-8B
LAYOUTS = ("sdpa_vattn_megacache", "sdpa_vattn", "sdpa_paged_16")
GIB = 2**30


def ranges_of(layout: str, length: int, device: torch.device) -> tuple[object, list[Tensor]]:
    """A cache with one request, and the memory ranges of its tokens."""
    spec = KVCacheSpec(LAYERS, KV_HEADS, HEAD_SIZE, torch.bfloat16, max_num_seqs=1, max_model_len=length)
    backend = BackendSpec.parse(layout)
    budget = spec.token_bytes * length + (2 if device.type == "cuda" else 1) * LAYERS * 2 * 2**22
    cache = create_cache_engine(backend, spec, device, budget)
    blocks = tuple(range(cache.capacity.rows_for(length))) if backend.is_paged else ()
    cache.prepare([Chunk("a", 0, length, True, length, blocks)])
    return cache, [each for layer in cache.ranges("a", 0, length) for each in layer]


def seconds(move: Callable[[], None], devices: Sequence[torch.device], repeats: int) -> float:
    """Median of several runs after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        began_s = time.perf_counter()
        move()
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began_s)
    return median(times[1:])


def measure(table: Table, layout: str, length: int, devices: Sequence[torch.device], repeats: int) -> None:
    """Measure one layout at one length, and one contiguous copy."""
    source, sent = ranges_of(layout, length, devices[0])
    target, received = ranges_of(layout, length, devices[1])
    num_bytes = sum(each.nbytes for each in sent)
    whole = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for device in devices]
    for each in sent:
        each.fill_(1)

    def move() -> None:
        for old, new in zip(sent, received, strict=True):
            new.copy_(old, non_blocking=True)

    one_s = seconds(lambda: whole[1].copy_(whole[0], non_blocking=True), devices, repeats)
    moved_s = seconds(move, devices, repeats)
    assert all(bool((each == 1).all()) for each in received)
    one = Record("llama-3-8b", "move a request", "one copy", 1, length, num_bytes / GIB / one_s, "GiB/s")
    table.add(Record("llama-3-8b", "ranges of a request", layout, 1, length, len(sent), "ranges"))
    table.add(
        Record("llama-3-8b", "move a request", layout, 1, length, num_bytes / GIB / moved_s, "GiB/s").compared_to(one)
    )
    for cache in (source, target):
        cache.close()  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cuda: from the first to the second")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[8192, 131072], help="tokens")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/transfer"))
    options = parser.parse_args()
    count = torch.cuda.device_count()
    if options.device == "cuda" and count < 2:
        raise ValueError(f"device=cuda: a transfer needs two CUDA devices, this machine has {count}")
    names = ("cuda:0", "cuda:1") if options.device == "cuda" else ("cpu", "cpu")
    table = Table(options.output / "transfer.csv")
    for layout in LAYOUTS:
        for length in options.lengths:
            work = [torch.device(name) for name in names]
            table.attempts.run(
                f"{layout} {length}",
                lambda: measure(table, layout, length, work, options.repeats),  # noqa: B023
            )
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
