"""Compute the largest batch within a KV budget by page size and layout, with the real allocator. Needs no GPU: the
host device reserves address space and counts pages without touching memory.

    python scripts/benchmark_page_size.py --output DIR

experiments/page_size.yml configures the comparison. Lengths follow the distribution of the arXiv prompts, or a CSV:
`--trace FILE.csv`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from sarathi.benchmark.config.program import parse_with_file, positive, size_bytes
from sarathi.benchmark.figures import draw
from sarathi.benchmark.records import Attempts
from sarathi.benchmark.workload.lengths import read_lengths
from sarathi.benchmark.workload.shapes import SHAPES
from sarathi.entrypoints.script import run_script
from sarathi.metrics.environment import environment
from vattention import OutOfMemoryError, VirtualKVCache

KIB, BF16_BYTES = 1 << 10, 2
DRAWN = 2895  # requests from a shape: as many as the arXiv trace has
LAYOUTS = ("per layer", "megacache")


class Model(NamedTuple):
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


def final_lengths(trace: str, seed: int) -> list[int]:
    """Final tokens of each request, when it holds the most memory. trace: a shape's name or a file."""
    if trace in SHAPES:
        prompts, outputs = SHAPES[trace].sample(DRAWN, np.random.default_rng(seed))
        return [int(total) for total in prompts + outputs]
    return [spec.num_tokens for spec in read_lengths(trace)]


def max_batch(make_cache: Callable[[], VirtualKVCache], lengths: Sequence[int]) -> tuple[int, float]:
    """Number of requests, in this order, that fit together, and the wasted fraction of their mapped bytes."""
    count = 0
    with make_cache() as cache:
        try:
            for length in lengths:
                cache.prepare([cache.alloc(length)], [length])
                count += 1
        except OutOfMemoryError:
            stats = cache.stats()
            return count, stats.wasted_bytes / (stats.mapped_bytes - stats.idle_bytes)
    raise ValueError(f"all {len(lengths)} requests of the trace fit: the budget is too large to compare")


def samples(lengths: Sequence[int], count: int) -> Iterator[list[int]]:
    """The trace from evenly spaced starting points."""
    for start in range(0, len(lengths), -(-len(lengths) // count)):
        yield [*lengths[start:], *lengths[:start]]


def measure(name: str, tensor_parallel: int, lengths: Sequence[int], options: argparse.Namespace) -> pd.DataFrame:
    """A record for each layout and page size that holds at least one token; ratios are to the first.

    max_batch: mean over the samples. wasted_percent: mapped bytes after the last token of each sequence.
    """
    model, found = MODELS[name], []
    budget_bytes = kv_budget(model, options, tensor_parallel)
    for layout, page_bytes in itertools.product(options.layouts, options.pages):
        kv_heads, megacache = max(1, model.kv_heads // tensor_parallel), layout == "megacache"
        if BF16_BYTES * kv_heads * model.head_size * (model.layers if megacache else 1) > page_bytes:
            continue
        make_cache = partial(
            VirtualKVCache, num_layers=model.layers, num_kv_heads=kv_heads, head_size=model.head_size, num_slots=1024,
            max_tokens=max(lengths), dtype=torch.bfloat16, budget_bytes=int(budget_bytes), page_bytes=page_bytes,
            megacache=megacache, deferred_reclamation=False,
        )  # fmt: skip
        batch, wasted = np.mean([max_batch(make_cache, order) for order in samples(lengths, options.samples)], axis=0)
        found.append((page_bytes // KIB, layout, batch, 100 * wasted))
    records = pd.DataFrame(found, columns=["page_kib", "layout", "max_batch", "wasted_percent"])
    records["against_2mib_per_layer"] = (records.max_batch / records.max_batch.iloc[0]).round(3)
    for column, value in enumerate((model.name, tensor_parallel, round(budget_bytes / 1e9, 1))):
        records.insert(column, ("model", "tensor_parallel", "budget_gb")[column], value)
    records = records.round({"max_batch": 1, "wasted_percent": 1})
    print(records.to_string(index=False), flush=True)
    return records


def kv_budget(model: Model, options: argparse.Namespace, tensor_parallel: int) -> float:
    weights_bytes = BF16_BYTES * model.parameters / tensor_parallel
    return options.budget_bytes - (weights_bytes if options.minus_weights else 0)


def save(records: pd.DataFrame, path: Path) -> None:
    """Write the records, the environment and the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records.to_csv(path, index=False, lineterminator="\n")
    path.with_suffix(".environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    draw(path)
    print(f"saved {path}")


def file_name(options: argparse.Namespace) -> str:
    """The table's name, by source of the lengths and by --minus-weights."""
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


def main() -> int:
    options = parse()
    lengths = final_lengths(options.trace, options.seed)
    print(f"{len(lengths)} requests, mean {np.mean(lengths):.0f} tokens, longest {max(lengths)}")
    attempts = Attempts()
    found = [
        attempts.run(f"{name} on {count} GPUs", partial(measure, name, count, lengths, options))
        for name, count in itertools.product(options.models, options.tensor_parallel)
    ]
    if records := [each for each in found if each is not None]:
        save(pd.concat(records), options.output / file_name(options))
    return attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
