"""Measures what page mapping costs on this machine: `python -m vattention.bench`.

Prints a table and saves it as CSV and JSON with the environment and the command.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from vattention.errors import OutOfMemoryError
from vattention.kv_cache import VirtualKVCache

PAGE_BYTES = 2 << 20  # CUDA's; the same on the CPU, so that the tables can be compared
CLASS_ROWS = (1, 4, 16, 64)
CALLS = ("create", "map", "unmap", "destroy")


@dataclass(frozen=True)
class Result:
    section: str
    case: str
    metric: str
    value: float
    unit: str


Results = Iterator[Result]


def driver_calls(device: torch.device, repeats: int = 20) -> Results:
    """Median microseconds of each call for a handle of 1, 4, 16 and 64 pages, and bytes mapped in a second."""
    for rows in CLASS_ROWS:
        times: dict[str, list[float]] = {call: [] for call in CALLS}
        for _ in range(repeats):
            cache = token_per_page(device, num_slots=1, rows=rows)
            cache.prepare([cache.alloc(rows)], [rows])
            cache.close()
            stats = cache.stats()
            for call, values in times.items():
                values.append(stats.seconds[call] / stats.calls[call] * 1e6)
        case = f"handle of {rows} pages ({rows * PAGE_BYTES >> 20} MiB)"
        for call, values in times.items():
            yield Result("driver call", case, call, statistics.median(values), "us")
        map_us = statistics.median(times["map"])
        yield Result("mapping bandwidth", case, "map", rows * PAGE_BYTES / map_us / 1e3, "GB/s")


def nothing_to_map(device: torch.device, repeats: int = 300) -> Results:
    """Time of prepare(), from Python, in a step in which no sequence needs a new page."""
    for num_slots in (1, 64, 512):
        with token_per_page(device, num_slots=num_slots, rows=num_slots) as cache:
            slots = [cache.alloc() for _ in range(num_slots)]
            tokens = [1] * num_slots
            cache.prepare(slots, tokens)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                cache.prepare(slots, tokens)
                times.append((time.perf_counter() - start) * 1e6)
        yield Result("prepare, nothing to map", f"{num_slots} slots", "median", statistics.median(times), "us")


def long_prompt(device: torch.device, tokens: int = 32768) -> Results:
    """A Llama-3-8B prompt in bf16 in the per-layer layout, mapped at once in large extents, and page by page.

    Cold: the pages are created too. Ready: they are in the pool, as in a server that has warmed up.
    """
    with llama_3_8b(device, num_slots=1, max_tokens=tokens, rows=tokens // 1024) as cache:
        per_page = cache.page_bytes // cache.token_bytes
        steps = {"extents": [tokens], "page by page": list(range(per_page, tokens + 1, per_page))}
        for state in ("cold", "ready"):
            spent = {case: prompt_us(cache, lengths, cold=state == "cold") for case, lengths in steps.items()}
            for case, value in spent.items():
                yield Result(f"{tokens}-token prompt, {state}", case, "prepare", value, "us")
            ratio = spent["page by page"] / spent["extents"]
            yield Result(f"{tokens}-token prompt, {state}", "extents against pages", "ratio", ratio, "x")


def prompt_us(cache: VirtualKVCache, lengths: list[int], cold: bool, repeats: int = 5) -> float:
    """Median microseconds to grow an empty slot through these lengths."""
    times = []
    for _ in range(repeats + (not cold)):
        if cold:
            empty_pool(cache)
        slot = cache.alloc()
        start = time.perf_counter()
        for length in lengths:
            cache.prepare([slot], [length])
        times.append((time.perf_counter() - start) * 1e6)
        cache.free(slot)
        cache.reclaim_idle()
    return statistics.median(times if cold else times[1:])  # the first round fills the pool


def empty_pool(cache: VirtualKVCache) -> None:
    budget_bytes = cache.capacity_rows * cache.row_bytes
    cache.resize(cache.row_bytes)
    cache.resize(budget_bytes)


def decode_capacity(device: torch.device) -> Results:
    """Sequences that grow by one row a step, in memory of large extents, must reach the last row of the budget."""
    rows = 3 * 64
    with token_per_page(device, num_slots=4, rows=rows) as cache:
        prompt = cache.alloc(rows)
        cache.prepare([prompt], [rows])
        cache.free(prompt)
        slots = [cache.alloc() for _ in range(3)]
        for length in range(1, rows // 3 + 1):
            cache.prepare(slots, [length] * 3)
        cache.check_integrity()
        lost = rows - (cache.stats().mapped_bytes - cache.stats().idle_bytes) // cache.row_bytes
        try:
            cache.prepare([slots[0]], [rows // 3 + 1])
            lost = -1
        except OutOfMemoryError:
            pass
    yield Result("decode growth after large extents", f"{rows} rows", "rows lost", lost, "rows")


def decode_loop(device: torch.device, steps: int = 400, num_slots: int = 16) -> Results:
    """A simulated decode of Llama-3-8B: time spent on memory in a step, mapping in the step or in the background."""
    compute = simulated_compute(device)
    for mode in ("sync", "async"):
        with llama_3_8b(device, num_slots=num_slots, max_tokens=4096, rows=3 * num_slots) as cache:
            cache.fill_pool(3 * num_slots * cache.row_bytes)
            times = sorted(decode_steps_us(cache, steps, prefetch=mode == "async", compute=compute))
            waited = cache.stats().prepares_waited - 1  # the first prepare maps the prompts
        for metric, value in (("p50", times[steps // 2]), ("p99", times[steps * 99 // 100]), ("max", times[-1])):
            yield Result("decode loop, memory time of a step", mode, metric, value, "us")
        yield Result("decode loop, memory time of a step", mode, "steps that waited", waited, f"of {steps}")


def decode_steps_us(cache: VirtualKVCache, steps: int, prefetch: bool, compute: Callable[[], None]) -> list[float]:
    """Microseconds of each step in prepare() and prefetch(). The sequences need new pages in different steps."""
    slots = [cache.alloc() for _ in range(cache.num_slots)]
    lengths = [1000 + 1024 * i // len(slots) for i in range(len(slots))]
    cache.prepare(slots, lengths)
    times = []
    for _ in range(steps):
        lengths = [length + 1 for length in lengths]
        start = time.perf_counter()
        cache.prepare(slots, lengths)
        if prefetch:
            cache.prefetch(slots, [length + 1 for length in lengths])
        times.append((time.perf_counter() - start) * 1e6)
        compute()
    return times


def simulated_compute(device: torch.device) -> Callable[[], None]:
    """Takes the time of a step, in which the worker maps: matrix products on a GPU, a sleep on the CPU."""
    if device.type == "cpu":
        return lambda: time.sleep(0.001)
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        torch.mm(torch.mm(matrix, matrix), matrix)
        torch.cuda.synchronize(device)

    multiply()
    return multiply


def token_per_page(device: torch.device, num_slots: int, rows: int) -> VirtualKVCache:
    """Two regions whose tokens are pages, so that lengths are rows."""
    return VirtualKVCache(
        num_layers=1,
        num_kv_heads=1,
        head_size=PAGE_BYTES,
        num_slots=num_slots,
        max_tokens=rows,
        dtype=torch.int8,
        device=device,
        budget_bytes=rows * 2 * PAGE_BYTES,
        page_bytes=PAGE_BYTES,
        reclaim_threshold=0,
    )


def llama_3_8b(device: torch.device, num_slots: int, max_tokens: int, rows: int) -> VirtualKVCache:
    """32 layers, 8 KV heads of 128, bf16: 64 regions, 1024 tokens in a page of 2 MiB."""
    return VirtualKVCache(
        num_layers=32,
        num_kv_heads=8,
        head_size=128,
        num_slots=num_slots,
        max_tokens=max_tokens,
        dtype=torch.bfloat16,
        device=device,
        budget_bytes=rows * 64 * PAGE_BYTES,
        page_bytes=PAGE_BYTES,
        reclaim_threshold=0,
    )


SECTIONS = (driver_calls, nothing_to_map, long_prompt, decode_capacity, decode_loop)


def environment(device: torch.device) -> dict[str, str]:
    facts = {
        "command": "python -m vattention.bench " + shlex.join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "system": platform.platform(),
        "cpus": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "page_bytes": str(PAGE_BYTES),
    }
    limit = Path("/proc/sys/vm/max_map_count")
    return facts | ({"vm.max_map_count": limit.read_text().strip()} if limit.exists() else {})


def save(results: list[Result], facts: dict[str, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    with (folder / "vattention_bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    report = json.dumps({"environment": facts, "results": rows}, indent=2)
    (folder / "vattention_bench.json").write_text(report + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vattention.bench", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or a CUDA index (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of CSV and JSON")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", int(options.device)) if options.device.isdigit() else torch.device(options.device)
    torch.empty(1, device=device)  # creates the CUDA context before anything is timed
    results: list[Result] = []
    for number, section in enumerate(SECTIONS, 1):
        print(f"[{number}/{len(SECTIONS)}] {section.__name__.replace('_', ' ')} ...", flush=True)
        for result in section(device):
            results.append(result)
            print(f"  {result.section:36} {result.case:28} {result.metric:18} {result.value:12.2f} {result.unit}")
    save(results, environment(device), options.output)
    print(f"saved {options.output / 'vattention_bench.csv'} and .json")


if __name__ == "__main__":
    main()
