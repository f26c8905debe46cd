"""Measures the kernels on the GPU at hand: attention on contiguous and paged memory, products, small kernels, steps.

    python scripts/benchmark_kernels.py --output DIR [--only small|attention] [--budget SECONDS] [--flashinfer]

Rows go to DIR/kernels.csv as they are known, most important first; what does not fit the budget is named at the end.
Needs the package on PYTHONPATH, and on it the libraries to compare (fa3-fwd, flashinfer, vllm).
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product, zip_longest
from pathlib import Path

import torch
from kernel_benchmark import decode, products
from kernel_benchmark.elementwise import measure_elementwise
from kernel_benchmark.prefill import measure_prefill
from kernel_benchmark.shapes import LLAMA, YI
from kernel_benchmark.step import measure_steps
from kernel_benchmark.warm_up import processes_at_hand, warm_up
from measurement.plot import draw_times
from measurement.table import Budget, Table, Work

SMALL_DECODE = [(16, 1024), (1, 1024), (64, 2048), (8, 32768), (16, 8192), (256, 1024), (1, 131072)]
DECODE = [*SMALL_DECODE, (16, 16384), (64, 4096), (1, 16384), (4, 65536), (1, 196608), (16, 4096), (8, 8192)]
PREFILL = [8192, 32768, 16384, 2048, 65536, 131072, 4096, 1024, 196608]


def small(table: Table) -> Work:
    """What one short call should tell: steps, decode attention, products, small kernels."""
    shapes = [(1, 1024), (16, 1024), (64, 1024), (256, 1024)]
    yield "steps llama", partial(measure_steps, table, LLAMA, shapes)
    for batch, context in SMALL_DECODE:
        measure = partial(decode.measure_decode, table, LLAMA, batch, context, decode.CONFIGS)
        yield f"decode llama {batch} x {context}", measure
    for batch, model in ((1, LLAMA), (16, LLAMA), (1, YI), (16, YI), (8, LLAMA), (4, LLAMA), (2, LLAMA)):
        for name in model.weights:
            yield f"{name} {model.name} {batch}", partial(products.measure_product, table, model, name, batch)
    for tokens in (1, 16, 256, 2048):
        yield f"small kernels {tokens}", partial(_elementwise, table, tokens)
    for batch, context in SMALL_DECODE[:4]:
        measure = partial(decode.measure_decode, table, YI, batch, context, decode.CONFIGS)
        yield f"decode yi {batch} x {context}", measure


def attention(table: Table, *, flashinfer: bool) -> Work:
    """Contiguous against paged memory, both models, decode and prefill in turn."""
    both = zip_longest(_decodes(table, flashinfer=flashinfer), _prefills(table, flashinfer=flashinfer))
    return (work for pair in both for work in pair if work is not None)


def _decodes(table: Table, *, flashinfer: bool) -> Work:
    for (batch, context), model in product(DECODE, (LLAMA, YI)):
        measure = partial(decode.measure_decode, table, model, batch, context, flashinfer=flashinfer)
        yield f"decode {model.name} {batch} x {context}", measure


def _prefills(table: Table, *, flashinfer: bool) -> Work:
    for context, model in product(PREFILL, (LLAMA, YI)):
        for chunk in sorted({context, min(2048, context)}):
            measure = partial(measure_prefill, table, model, chunk, context, flashinfer=flashinfer)
            yield f"prefill {model.name} {chunk} at {context}", measure


def _elementwise(table: Table, tokens: int) -> None:
    from sarathi.model_executor.kernels.fused.kernels import FusedKernels
    from sarathi.model_executor.kernels.reference.kernels import ReferenceKernels

    measure_elementwise(table, LLAMA, tokens, FusedKernels(torch.device("cuda")), ReferenceKernels())


def _jobs(only: str | None) -> Iterator[Callable[[], None]]:
    shapes = [(model, *shape) for model, shape in product((LLAMA, YI), DECODE)]
    if only == "attention":
        return decode.warm_up_jobs(shapes, [None])
    return chain(decode.warm_up_jobs(shapes, [None, *decode.CONFIGS]), products.warm_up_jobs())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for kernels.csv and its plot")
    parser.add_argument("--only", choices=("small", "attention"), help="one part (default: both)")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds, compilation included")
    parser.add_argument("--flashinfer", action="store_true", help="FlashInfer too (compiles its kernels, 1-3 minutes)")
    options = parser.parse_args()
    budget = Budget(options.budget)
    warm_up(partial(_jobs, options.only), processes_at_hand())
    torch.manual_seed(0)
    table = Table(options.output / "kernels.csv")
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {budget.left_s:.0f} s left", flush=True)
    with torch.inference_mode():
        if options.only != "attention":
            budget.run(small(table))
        if options.only != "small":
            budget.run(attention(table, flashinfer=options.flashinfer))
    draw_times(table.rows, options.output / "kernels.png")


if __name__ == "__main__":
    main()
