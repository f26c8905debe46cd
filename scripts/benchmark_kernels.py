"""Measure kernels on a GPU: attention on contiguous and paged memory, matrix products, element-wise kernels.

    python scripts/benchmark_kernels.py --output DIR [--only small|attention|ragged|shared] [--budget SECONDS]
        [--flashinfer [decode] [prefill]]

small: decode attention, products, element-wise kernels; attention: sequences of equal length, contiguous and paged;
ragged: chat-like lengths, decodes alone and mixed with chunks; shared: groups of sequences with a common prefix, read
once per group or once per sequence. experiments/kernels.yml has the attention shapes. Records are written immediately
to DIR/kernels.csv, DIR/ragged.csv and DIR/shared.csv, the most important first; measurements beyond the budget are
listed at the end. Compared libraries (fa3-fwd, flashinfer, vllm) must be importable.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch

from sarathi.benchmark.config.program import parse_with_file, positive
from sarathi.benchmark.figures import draw
from sarathi.benchmark.kernels import paging, products
from sarathi.benchmark.kernels.elementwise import measure_elementwise
from sarathi.benchmark.kernels.ragged import Mixed, measure_chats, measure_mixed
from sarathi.benchmark.kernels.ragged import warm_up_jobs as warm_up_ragged
from sarathi.benchmark.kernels.shapes import LLAMA, MODELS, YI, Model, Pages
from sarathi.benchmark.kernels.shared_prefix import Shared, measure_shared
from sarathi.benchmark.kernels.shared_prefix import warm_up_jobs as warm_up_shared
from sarathi.benchmark.kernels.warm_up import processes_at_hand, warm_up
from sarathi.benchmark.records import Attempts, Budget, Table, Work
from sarathi.entrypoints.script import run_script

ATTENTION = ("decode", "prefill")
SMALL_SHAPES = {LLAMA: 7, YI: 4}  # how many of the decodes a short call measures, of the first


def small(table: Table, options: argparse.Namespace) -> Work:
    """Decode attention, matrix products and element-wise kernels: the most informative short measurement."""
    pages = Pages(tuple(options.pages), ())
    for batch, context in options.decode[: SMALL_SHAPES[LLAMA]]:
        measure = partial(paging.measure_decode, table, LLAMA, batch, context, pages, paging.CONFIGS)
        yield f"decode llama {batch} x {context}", measure
    for batch, model in ((1, LLAMA), (16, LLAMA), (1, YI), (16, YI), (8, LLAMA), (4, LLAMA), (2, LLAMA)):
        for name in model.weights:
            yield f"{name} {model.name} {batch}", partial(products.measure_product, table, model, name, batch)
    for tokens in (1, 16, 256, 2048):
        yield f"small kernels {tokens}", partial(_elementwise, table, tokens)
    for batch, context in options.decode[: SMALL_SHAPES[YI]]:
        measure = partial(paging.measure_decode, table, YI, batch, context, pages, paging.CONFIGS)
        yield f"decode yi {batch} x {context}", measure


def attention(table: Table, options: argparse.Namespace) -> Work:
    """Contiguous and paged memory on all models, alternating decode and prefill."""
    both = zip_longest(_decodes(table, options), _prefills(table, options))
    return (work for pair in both for work in pair if work is not None)


def ragged(table: Table, options: argparse.Namespace) -> Work:
    """Ragged batches: decodes and mixed steps."""
    for decodes, name in product(options.chats, options.models):
        yield f"{decodes} chats {name}", partial(measure_chats, table, MODELS[name], decodes)
    for mixed, name in product(options.mixed, options.models):
        yield f"{mixed.work} {name}", partial(measure_mixed, table, MODELS[name], mixed)


def shared(table: Table, options: argparse.Namespace) -> Work:
    """Sequences with a common prefix."""
    for shape, name in product(options.shared, options.models):
        yield f"{shape.sequences} decodes, {shape.work} {name}", partial(measure_shared, table, MODELS[name], shape)


class Part(NamedTuple):
    """One choice of --only."""

    work: Callable[[Table, argparse.Namespace], Work]
    compile: Callable[[argparse.Namespace], Iterator[Callable[[], object]]]  # what Triton will be asked for
    file: str  # of the CSV file and its picture


def _pages(options: argparse.Namespace, kind: str) -> Pages:
    with_flashinfer = options.flashinfer is not None and kind in (options.flashinfer or ATTENTION)
    return Pages(tuple(options.pages), tuple(options.flashinfer_pages) if with_flashinfer else ())


def _decodes(table: Table, options: argparse.Namespace) -> Work:
    pages = _pages(options, "decode")
    for model, batch, context in _decode_shapes(options):
        measure = partial(paging.measure_decode, table, model, batch, context, pages)
        yield f"decode {model.name} {batch} x {context}", measure


def _prefills(table: Table, options: argparse.Namespace) -> Work:
    pages = _pages(options, "prefill")
    for context, name in product(options.prefill, options.models):
        for chunk in sorted({context, min(options.chunk, context)}):
            measure = partial(paging.measure_prefill, table, MODELS[name], chunk, context, pages)
            yield f"prefill {name} {chunk} at {context}", measure


def _decode_shapes(options: argparse.Namespace) -> list[tuple[Model, int, int]]:
    return [(MODELS[name], *shape) for shape, name in product(options.decode, options.models)]


def _elementwise(table: Table, tokens: int) -> None:
    from sarathi.model_executor.ops.native import NativeOps
    from sarathi.model_executor.ops.triton.ops import TritonOps

    measure_elementwise(table, LLAMA, tokens, TritonOps(torch.device("cuda")), NativeOps())


def _compile_small(options: argparse.Namespace) -> Iterator[Callable[[], object]]:
    return chain(paging.warm_up_jobs(_decode_shapes(options), [None, *paging.CONFIGS]), products.warm_up_jobs())


def _compile_attention(options: argparse.Namespace) -> Iterator[Callable[[], object]]:
    return paging.warm_up_jobs(_decode_shapes(options), [None])


def _compile_ragged(options: argparse.Namespace) -> Iterator[Callable[[], object]]:
    counts = [*options.chats, *(mixed.decodes for mixed in options.mixed)]
    return warm_up_ragged([MODELS[name] for name in options.models], counts)


def _compile_shared(options: argparse.Namespace) -> Iterator[Callable[[], object]]:
    return warm_up_shared([MODELS[name] for name in options.models], options.shared)


PARTS = {
    "small": Part(small, _compile_small, "kernels"),
    "attention": Part(attention, _compile_attention, "kernels"),
    "ragged": Part(ragged, _compile_ragged, "ragged"),
    "shared": Part(shared, _compile_shared, "shared"),
}


def _jobs(options: argparse.Namespace) -> Iterator[Callable[[], object]]:
    return chain.from_iterable(part.compile(options) for part in _chosen(options))


def _chosen(options: argparse.Namespace) -> list[Part]:
    return [part for name, part in PARTS.items() if options.only in (None, name)]


def _shape(text: str) -> tuple[int, int]:
    """Parse sequences x tokens, as 16x1024."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be sequences x tokens, as 16x1024")
    return int(found[1]), int(found[2])


def _mixed(text: str) -> Mixed:
    """Parse decodes + chunks x tokens, as 256+1x1792."""
    found = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be decodes + chunks x tokens, as 256+1x1792")
    return Mixed(*map(int, found.groups()))


def _shared(text: str) -> Shared:
    """Parse groups x members x shared tokens + own tokens, as 8x6x32768+256."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be groups x members x tokens + tokens, as 8x6x32768+256")
    return Shared(*map(int, found.groups()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("results/kernels"), help="folder for kernels.csv and its plot"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--decode", nargs="+", type=_shape, metavar="SEQUENCESxTOKENS")
    parser.add_argument("--prefill", nargs="+", type=positive, metavar="TOKENS", help="of a prompt")
    parser.add_argument("--chunk", type=positive, help="tokens of the last part of a prompt, measured beside the whole")
    parser.add_argument("--pages", nargs="+", type=positive, metavar="TOKENS", help="of a block, FlashAttention 3")
    parser.add_argument("--flashinfer-pages", nargs="+", type=positive, metavar="TOKENS")
    parser.add_argument("--chats", nargs="+", type=positive, metavar="SEQUENCES", help="lengths as in chats")
    parser.add_argument("--mixed", nargs="+", type=_mixed, metavar="DECODES+CHUNKSxTOKENS", help="of one step")
    parser.add_argument("--shared", nargs="+", type=_shared, metavar="GROUPSxMEMBERSxSHARED+OWN", help="prefixes")
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds, compilation included")
    parser.add_argument(
        "--flashinfer", nargs="*", choices=ATTENTION, help="FlashInfer too (compiles its kernels, 1-3 minutes each)"
    )
    return parse_with_file(parser, "kernels")


def main() -> int:
    options = parse()
    if not torch.cuda.device_count():  # is_available() may open CUDA, which the children of warm_up() must do first
        raise ValueError("kernels are measured on a CUDA device, but none is available")
    attempts = Attempts()
    budget = Budget(options.budget, attempts)
    warm_up(partial(_jobs, options), processes_at_hand())
    torch.manual_seed(0)
    parts = _chosen(options)
    files = dict.fromkeys(part.file for part in parts)
    tables = {file: Table(options.output / f"{file}.csv", attempts) for file in files}
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {budget.left_s:.0f} s left", flush=True)
    with torch.inference_mode():
        for part in parts:
            budget.run(part.work(tables[part.file], options))
    for table in tables.values():
        draw(table.path)
    return attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
