"""Compare a region per layer's K and V with one region for all layers (megacache): layouts.csv and layouts.png.

    python scripts/benchmark_layouts.py --model llama-3-8b --output DIR

Each layout gets an engine with all of the free memory, in an order that alternates between rounds, and runs prefill,
decode, short requests and the static traces of the vAttention paper. Then it runs many short requests in a small cache:
a page of one layer holds 1,024 tokens of Llama-3-8B and a page of all layers 32, which wastes fewer bytes after each
request's last token. layouts_samples.csv has the records of every round, layouts.csv their medians.
"""

import argparse
import time
from functools import partial

from sarathi.benchmark.config.program import add_stages, engine_parser, parse, positive
from sarathi.benchmark.engines.load import Load
from sarathi.benchmark.engines.ours import OurEngine, open_engine
from sarathi.benchmark.engines.sizes import FULL, SMALL, Sizes
from sarathi.benchmark.figures import draw
from sarathi.benchmark.records import Budget, Table
from sarathi.config.units import parse_bytes
from sarathi.entrypoints.script import run_script

STAGES = ("prefill", "decode", "requests", "trace", "little")
COMPARED = FULL._replace(prefill=(8192, 32768), decode=((1, 1024), (16, 1024), (64, 1024), (256, 1024)))
REQUESTS = (512, 200, 128)  # count, prompt and output tokens
FEW_REQUESTS = (12, 20, 8)


def crowd(load: Load, engine: OurEngine, memory_bytes: int, requests: tuple[int, int, int]) -> None:
    """Measure equal short requests that arrive at once: maximum batch size and output tokens per second."""
    count, prompt, output = requests
    engine.resize(memory_bytes)
    most, start_s = 0, time.perf_counter()
    for _ in range(count):
        engine.add(load.prompt(prompt), output)
    while engine.has_work:
        engine.step()
        most = max(most, engine.num_running)
    seconds = time.perf_counter() - start_s
    memory = f"{memory_bytes / 2**30:g} GiB"
    load.record(f"requests that run at once in {memory}", count, prompt + output, most, "requests")
    load.record(f"{count} requests in {memory}", count, prompt + output, count * output / seconds, "output tokens/s")


def measure(options: argparse.Namespace, table: Table, sizes: Sizes, budget: Budget, backend: str) -> None:
    """Measure one layout in one round."""
    engine = open_engine(options, backend)
    load = Load(engine, table, options.model, sizes, options.seed)
    load.warm_up()
    budget.run(load.plan([stage for stage in options.stages if stage != "little"]))
    if "little" in options.stages:
        requests = FEW_REQUESTS if options.test else REQUESTS
        squeeze = partial(crowd, load, engine, parse_bytes(options.little_bytes), requests)
        budget.run([("short requests in little memory", squeeze)])
    engine.close()


def main() -> int:
    parser = engine_parser(__doc__, "results/layouts")
    parser.set_defaults(max_num_seqs=1024, max_model_len=36864)
    add_stages(parser, STAGES)
    parser.add_argument("--rounds", type=positive, default=2, help="engines of each layout")
    parser.add_argument("--trace-requests", type=positive, default=12, help="requests of a static trace")
    parser.add_argument("--little-bytes", default="8gb", help="of KV cache for the short requests, as 8gb")
    options = parse(parser, {"little_bytes": "2mb", "max_num_seqs": 16, "trace_requests": 3})
    sizes = SMALL if options.test else COMPARED
    sizes = sizes._replace(traces=tuple((options.trace_requests, *trace[1:]) for trace in sizes.traces))
    samples = Table(options.output / "layouts_samples.csv")
    budget = Budget(options.budget, samples.attempts)
    layouts = [options.backend, f"{options.backend}_megacache"]
    for number in range(options.rounds):
        for backend in layouts[:: -1 if number % 2 else 1]:
            print(f"# {backend}, round {number}", flush=True)
            measure(options, samples, sizes, budget, backend)
    table = Table(options.output / "layouts.csv", samples.attempts)
    table.add_medians(samples.records, layouts[1])
    draw(table.path)
    return samples.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
