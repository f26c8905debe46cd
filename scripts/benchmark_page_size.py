"""Largest batch under a KV budget by page size and layout, counted by the real allocator. Knows no GPU: it runs on the
host device, where address space is reserved and pages are counted but no memory is touched.

    python scripts/benchmark_page_size.py --trace arxiv.csv --output experiments/page_size
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from vattention import OutOfMemoryError, VirtualKVCache

KIB, MIB = 1 << 10, 1 << 20
LAYOUTS = ((2 * MIB, False), (64 * KIB, False), (2 * MIB, True), (64 * KIB, True))


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    kv_heads: int
    head_size: int
    parameters: float


MODELS = (
    Model("Yi-6B-200K", 32, 4, 128, 6.06e9),
    Model("Llama-3-8B", 32, 8, 128, 8.03e9),
    Model("Yi-34B-200K", 60, 8, 128, 34.39e9),
)


@dataclass(frozen=True)
class Row:
    model: str
    tensor_parallel: int
    budget_gb: float  # KV bytes of one GPU, 1e9
    page_kib: int
    layout: str
    max_batch: float  # mean over the samples
    wasted_percent: float  # of the mapped bytes, behind the last token of each sequence
    against_2mib_per_layer: float


def read_lengths(path: Path) -> list[int]:
    """Tokens of each request at its end, when it holds most."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [int(float(row["num_prefill_tokens"])) + int(float(row["num_decode_tokens"])) for row in rows]


def max_batch(cache: VirtualKVCache, lengths: Sequence[int]) -> tuple[int, float]:
    """Requests of this order that fit together, and the share of their pages that no token uses."""
    slots: list[int] = []
    try:
        for length in lengths:
            slots.append(cache.alloc(length))
            cache.prepare(slots[-1:], [length])
    except OutOfMemoryError:
        pass
    else:
        raise SystemExit(f"all {len(lengths)} requests of the trace fit: the budget is too large to compare")
    stats = cache.stats()
    for slot in slots:
        cache.free(slot)
    return len(slots) - 1, stats.wasted_bytes / (stats.mapped_bytes - stats.idle_bytes)


def samples(lengths: Sequence[int], count: int) -> Iterator[list[int]]:
    """The trace from evenly spaced starting points."""
    for start in range(0, len(lengths), -(-len(lengths) // count)):
        yield [*lengths[start:], *lengths[:start]]


def measure(
    model: Model, tensor_parallel: int, budget_bytes: float, lengths: Sequence[int], count: int
) -> Iterator[Row]:
    """One row for each page size and layout in which a page holds a token, the baseline first."""
    baseline = 0.0
    kv_heads = max(1, model.kv_heads // tensor_parallel)
    token_bytes = 2 * kv_heads * model.head_size  # bf16, one layer
    for page_bytes, megacache in LAYOUTS:
        if token_bytes * (model.layers if megacache else 1) > page_bytes:
            continue
        results = []
        for order in samples(lengths, count):
            with VirtualKVCache(
                num_layers=model.layers,
                num_kv_heads=kv_heads,
                head_size=model.head_size,
                num_slots=1024,
                max_tokens=max(lengths),
                dtype=torch.bfloat16,
                budget_bytes=int(budget_bytes),
                page_bytes=page_bytes,
                megacache=megacache,
                deferred_reclamation=False,
            ) as cache:
                results.append(max_batch(cache, order))
        batch = statistics.mean(batch for batch, _ in results)
        baseline = baseline or batch
        yield Row(
            model=model.name,
            tensor_parallel=tensor_parallel,
            budget_gb=round(budget_bytes / 1e9, 1),
            page_kib=page_bytes // KIB,
            layout="megacache" if megacache else "per layer",
            max_batch=round(batch, 1),
            wasted_percent=round(100 * statistics.mean(wasted for _, wasted in results), 1),
            against_2mib_per_layer=round(batch / baseline, 3),
        )


def kv_budget(model: Model, options: argparse.Namespace, tensor_parallel: int) -> float:
    weights_bytes = 2 * model.parameters / tensor_parallel  # bf16
    return options.budget_bytes - (weights_bytes if options.minus_weights else 0)


def save(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="CSV with num_prefill_tokens, num_decode_tokens")
    parser.add_argument("--budget-bytes", type=float, default=80e9, help="memory of one GPU (default: 80e9)")
    parser.add_argument("--minus-weights", action="store_true", help="take bf16 weights off the budget first")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2], help="GPUs that split the KV heads")
    parser.add_argument("--samples", type=int, default=10, help="starting points in the trace (default: 10)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the CSV")
    options = parser.parse_args()
    lengths = read_lengths(options.trace)
    print(f"{len(lengths)} requests, mean {statistics.mean(lengths):.0f} tokens, longest {max(lengths)}")
    rows: list[Row] = []
    for model, parallel in itertools.product(MODELS, options.tensor_parallel):
        for row in measure(model, parallel, kv_budget(model, options, parallel), lengths, options.samples):
            rows.append(row)
            print("| " + " | ".join(str(value) for value in asdict(row).values()) + " |", flush=True)
    name = "max_batch_minus_weights.csv" if options.minus_weights else "max_batch.csv"
    save(rows, options.output / name)
    print(f"saved {options.output / name}")


if __name__ == "__main__":
    main()
