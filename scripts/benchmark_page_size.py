"""Largest batch under a KV budget by page size and layout, counted by the real allocator. Knows no GPU: it runs on the
host device, where address space is reserved and pages are counted but no memory is touched.

    python scripts/benchmark_page_size.py --output DIR

What is compared is in experiments/page_size.yml. Lengths are drawn from the shape of the arXiv prompts, or read
from a CSV: `--trace FILE.csv`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sarathi.benchmark.config.program import parse_with_file, positive, size_bytes
from sarathi.benchmark.plots import draw_bars
from sarathi.benchmark.records import Attempts
from sarathi.benchmark.workload.datasets import read_lengths
from sarathi.benchmark.workload.shapes import SHAPES
from sarathi.entrypoints.script import run_script
from sarathi.metrics.environment import environment
from vattention import OutOfMemoryError, VirtualKVCache

KIB = 1 << 10
DRAWN = 2895  # requests from a shape: as many as the arXiv trace has
LAYOUTS = ("per layer", "megacache")


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    kv_heads: int
    head_size: int
    parameters: float


_ALL = (
    Model("Yi-6B-200K", 32, 4, 128, 6.06e9),
    Model("Llama-3-8B", 32, 8, 128, 8.03e9),
    Model("Yi-34B-200K", 60, 8, 128, 34.39e9),
)
MODELS = {model.name: model for model in _ALL}


@dataclass(frozen=True)
class Record:
    model: str
    tensor_parallel: int
    budget_gb: float  # KV bytes of one GPU, 1e9
    page_kib: int
    layout: str
    max_batch: float  # mean over the samples
    wasted_percent: float  # of the mapped bytes, behind the last token of each sequence
    against_2mib_per_layer: float


def final_lengths(trace: str, seed: int) -> list[int]:
    """Tokens of each request at its end, when it holds most. trace: a shape's name or a file's."""
    if trace in SHAPES:
        prompts, outputs = SHAPES[trace].sample(DRAWN, np.random.default_rng(seed))
        return [int(total) for total in prompts + outputs]
    return [spec.num_prefill_tokens + spec.num_decode_tokens for spec in read_lengths(trace)]


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
        raise ValueError(f"all {len(lengths)} requests of the trace fit: the budget is too large to compare")
    stats = cache.stats()
    for slot in slots:
        cache.free(slot)
    return len(slots) - 1, stats.wasted_bytes / (stats.mapped_bytes - stats.idle_bytes)


def samples(lengths: Sequence[int], count: int) -> Iterator[list[int]]:
    """The trace from evenly spaced starting points."""
    for start in range(0, len(lengths), -(-len(lengths) // count)):
        yield [*lengths[start:], *lengths[:start]]


def measure(
    model: Model, tensor_parallel: int, lengths: Sequence[int], options: argparse.Namespace
) -> Iterator[Record]:
    """One row for each page size and layout in which a page holds a token; ratios are to the first."""
    baseline, budget_bytes = 0.0, kv_budget(model, options, tensor_parallel)
    kv_heads = max(1, model.kv_heads // tensor_parallel)
    token_bytes = 2 * kv_heads * model.head_size  # bf16, one layer
    for layout, page_bytes in itertools.product(options.layouts, options.pages):
        megacache = layout == "megacache"
        if token_bytes * (model.layers if megacache else 1) > page_bytes:
            continue
        results = []
        for order in samples(lengths, options.samples):
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
        yield Record(
            model=model.name,
            tensor_parallel=tensor_parallel,
            budget_gb=round(budget_bytes / 1e9, 1),
            page_kib=page_bytes // KIB,
            layout=layout,
            max_batch=round(batch, 1),
            wasted_percent=round(100 * statistics.mean(wasted for _, wasted in results), 1),
            against_2mib_per_layer=round(batch / baseline, 3),
        )


def kv_budget(model: Model, options: argparse.Namespace, tensor_parallel: int) -> float:
    weights_bytes = 2 * model.parameters / tensor_parallel  # bf16
    return options.budget_bytes - (weights_bytes if options.minus_weights else 0)


def save(rows: Sequence[Record], path: Path) -> None:
    """The rows, what they were made with, and a picture of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    path.with_suffix(".environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    draw_bars(panels(rows), path.with_suffix(".png"), "requests that fit", len({row.tensor_parallel for row in rows}))
    print(f"saved {path}")


def panels(rows: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Model and GPUs -> page and layout -> the largest batch."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        page = f"{row.page_kib} KiB" if row.page_kib < KIB else f"{row.page_kib // KIB} MiB"
        panel = f"{row.model}, {row.tensor_parallel} GPU{'s' * (row.tensor_parallel > 1)}"
        found.setdefault(panel, {})[f"{page}\n{row.layout}"] = row.max_batch
    return found


def file_name(options: argparse.Namespace) -> str:
    """What was counted: tables of a shape and of a file, with the weights and without, lie side by side."""
    shape = f"_{options.trace}_shape" if options.trace in SHAPES else ""
    return f"max_batch{shape}{'_minus_weights' if options.minus_weights else ''}.csv"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ", ".join(SHAPES)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--pages", nargs="+", type=size_bytes, help="as 2mb; the first is what ratios are to")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--trace", help=f"{shapes}, or a CSV: num_prefill_tokens, num_decode_tokens")
    parser.add_argument("--seed", type=int, default=0, help="of lengths that are drawn from a shape")
    parser.add_argument("--budget-bytes", type=float, help="memory of one GPU")
    parser.add_argument("--minus-weights", action="store_true", help="take bf16 weights off the budget first")
    parser.add_argument("--tensor-parallel", type=positive, nargs="+", help="GPUs that split the KV heads")
    parser.add_argument("--samples", type=positive, help="starting points in the trace")
    parser.add_argument("--output", type=Path, default=Path("results/page_size"), help="folder of the CSV and plot")
    parser.add_argument("--test", action="store_true", help="a short form: one GPU, one starting point")
    return parse_with_file(parser, "page_size")


def add_rows(
    rows: list[Record], model: Model, parallel: int, lengths: Sequence[int], options: argparse.Namespace
) -> None:
    """Adds the rows of one model on so many GPUs as they come."""
    for row in measure(model, parallel, lengths, options):
        rows.append(row)
        print("| " + " | ".join(str(value) for value in asdict(row).values()) + " |", flush=True)


def main() -> int:
    options = parse()
    lengths = final_lengths(options.trace, options.seed)
    print(f"{len(lengths)} requests, mean {statistics.mean(lengths):.0f} tokens, longest {max(lengths)}")
    rows: list[Record] = []
    attempts = Attempts()
    for name, parallel in itertools.product(options.models, options.tensor_parallel):
        attempts.run(f"{name} on {parallel} GPUs", partial(add_rows, rows, MODELS[name], parallel, lengths, options))
    if rows:
        save(rows, options.output / file_name(options))
    return attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
