"""Measure the engine with random weights, and its kernels alone as a roofline: engine.csv and engine.png.

    python scripts/benchmark_engine.py --model llama-3-8b --backend fa_vattn --output DIR [--stages prefill,decode,...]
        [--mapped-weights]

One engine is built per run. It measures prefill (whole and chunked), decode, short requests, the static traces of the
vAttention paper, decode with sampling and with a metrics store, and the GPU's work in a decode step. Then the engine is
closed, and matrix products and attention run alone at the same shapes. Records come in the order of --stages; what
--budget leaves out is named. Several runs may write to one folder.
"""

import gc
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from sarathi.benchmark.config.program import add_ratios, add_stages, engine_parser, parse
from sarathi.benchmark.engines.device import NUM_SHAPES, device_work, measure_clock
from sarathi.benchmark.engines.load import STAGES, Load
from sarathi.benchmark.engines.ours import GREEDY, OurEngine, open_engine
from sarathi.benchmark.engines.sizes import FULL, SMALL, Sizes
from sarathi.benchmark.figures import draw
from sarathi.benchmark.kernels.roofline import Roofline
from sarathi.benchmark.kernels.shapes import MODELS
from sarathi.benchmark.kernels.timing import steady
from sarathi.benchmark.records import BOUND, Budget, Record, Table, Work
from sarathi.benchmark.revisions.worker import process_age_s
from sarathi.entrypoints.script import run_script

OWN_STAGES = ("sampled", "metrics", "device", "roofline")
SAMPLED, SAMPLING = "decode, temperature 0.8, top-p 0.95", {"temperature": 0.8, "top_p": 0.95}


def measure_sampled(engine: OurEngine, load: Load, batch: int, context: int) -> None:
    """Compare decode with sampling to greedy decode."""

    def row(backend: str, sampling: dict[str, float]) -> Record:
        engine.sampling = sampling
        found = load.decoding([context] * batch, load.sizes.decode_steps)
        return Record(load.model, SAMPLED, backend, batch, context, found.ms_per_token, "ms/token")

    drawn, likeliest = row(engine.backend, SAMPLING), row("temperature 0", GREEDY)
    load.table.add(likeliest)
    load.table.add(drawn.compared_to(likeliest))


def measure_metrics(engine: OurEngine, load: Load, batch: int, context: int) -> None:
    """Compare decode with a metrics store to decode without one."""

    def row(backend: str, *, on: bool) -> Record:
        engine.record_metrics(on=on)
        found = load.decoding([context] * batch, load.sizes.decode_steps)
        return Record(load.model, "decode, metrics on", backend, batch, context, found.ms_per_token, "ms/token")

    off, on = row("metrics off", on=False), row(engine.backend, on=True)
    load.table.add(off)
    load.table.add(on.compared_to(off))


def short_work(engine: OurEngine, load: Load, name: str, measure: Callable[..., None]) -> Work:
    shapes = load.decode_shapes()[:NUM_SHAPES]
    return ((f"{name} {b} x {n}", partial(measure, engine, load, b, n)) for b, n in shapes)


def measure_roofline(table: Table, row: Record, context: float, roofline: Roofline, chunk: int, sizes: Sizes) -> None:
    """Measure the kernels of a record's workload and compare; for short decodes, also record clock and power."""
    on_gpu, is_decode = torch.cuda.is_available(), row.work == "decode"
    if on_gpu:
        torch.cuda.empty_cache()
    sample = roofline.decode(row.batch, round(context)) if is_decode else roofline.prefill(row.context, chunk)
    microseconds = steady(sample, sizes.steady_s)
    reference = replace(row, backend=BOUND, value=microseconds / (1e3 if is_decode else 1e6))
    table.add(reference)
    table.compare(row, reference)
    if on_gpu and is_decode and (row.batch, row.context) in sizes.decode[:NUM_SHAPES]:
        measure_clock(lambda work, **found: table.add(replace(reference, work=work, **found)), sample)


def roofline_work(
    table: Table, contexts: Mapping[Record, float], sizes: Sizes, chunk_size: int, roofline: Roofline
) -> Work:
    """Roofline measurements for this run's prefill and decode records, shortest first."""
    chunks = {"prefill": chunk_size, sizes.chunked_work: sizes.chunk}
    for row, context in sorted(contexts.items(), key=lambda item: item[0].batch * item[0].context):
        chunk = min(chunks.get(row.work, 1), row.context)
        name = f"roofline: {row.work} {row.batch} x {row.context}"
        yield name, partial(measure_roofline, table, row, context, roofline, chunk, sizes)


def run_engine(options: Namespace, table: Table, sizes: Sizes, budget: Budget) -> Mapping[Record, float]:
    """Run the stages that need the engine, and close it. Returns Load.contexts."""
    engine = open_engine(options, options.backend, mapped_weights=options.mapped_weights)
    load = Load(engine, table, options.model, sizes, options.seed)
    load.start(process_age_s)
    budget.run(load.plan([stage for stage in options.stages if stage in STAGES]))
    if "sampled" in options.stages:
        budget.run(short_work(engine, load, "sampled", measure_sampled))
    if "metrics" in options.stages:
        budget.run(short_work(engine, load, "metrics", measure_metrics))
    if "device" in options.stages:
        budget.run(device_work(load))
    engine.close()
    return load.contexts


@torch.inference_mode()
def run_roofline(
    options: Namespace, table: Table, sizes: Sizes, contexts: Mapping[Record, float], budget: Budget
) -> None:
    """Measure the kernels of the same workloads alone."""
    gc.collect()  # the engine's weights
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    roofline = Roofline(MODELS[options.model], device, dtype)
    budget.run(roofline_work(table, contexts, sizes, options.chunk_size, roofline))


def main() -> int:
    parser = engine_parser(__doc__, "results/engine")
    add_stages(parser, (*STAGES, *OWN_STAGES))
    add_ratios(parser)
    parser.add_argument("--mapped-weights", action="store_true", help="weights in memory that sleep level 2 gives back")
    options = parse(parser)
    sizes, table = SMALL if options.test else FULL.with_ratios(options.ratios), Table(options.output / "engine.csv")
    budget = Budget(options.budget, table.attempts)
    contexts = run_engine(options, table, sizes, budget)
    if "roofline" in options.stages:
        run_roofline(options, table, sizes, contexts, budget)
    draw(table.path)
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
