"""A region for each layer's K and V against one for all layers (megacache), end to end: layouts.csv and layouts.png.

    python scripts/benchmark_layouts.py --model llama-3-8b --output DIR

Speed of both where memory is plentiful, then many short requests in the same little memory: a page of one layer holds
1,024 tokens of Llama-3-8B and a page of all layers 32, so that fewer bytes lie behind the last token of each request.
"""

import argparse
import time
from functools import partial

from sarathi.benchmark.config.program import engine_parser, parse
from sarathi.benchmark.engines.load import Load
from sarathi.benchmark.engines.ours import OurEngine, open_engine
from sarathi.benchmark.plots import draw_ratios
from sarathi.benchmark.records import Budget, Table
from sarathi.benchmark.workload.sizes import FULL, SMALL, Sizes
from sarathi.config.units import parse_bytes
from sarathi.entrypoints.script import run_script

LITTLE = FULL._replace(prefill=(8192, 32768), decode=((1, 1024), (16, 1024), (64, 1024), (16, 8192), (8, 32768)))
REQUESTS = (512, 200, 128)  # count, prompt and output tokens
FEW_REQUESTS = (12, 20, 8)


def crowd(load: Load, engine: OurEngine, memory_bytes: int, requests: tuple[int, int, int]) -> None:
    """Equal short requests that are all there at once: how many run together at most, and output tokens a second."""
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


def measure(options: argparse.Namespace, table: Table, sizes: Sizes, backend: str) -> None:
    """One layout."""
    engine = open_engine(options, backend)
    load = Load(engine, table, options.model, sizes, options.seed)
    load.warm_up()
    requests = FEW_REQUESTS if options.test else REQUESTS
    squeeze = partial(crowd, load, engine, parse_bytes(options.little_bytes), requests)
    budget = Budget(options.budget / 2, table.attempts)
    budget.run([*load.plan(("decode", "prefill")), ("short requests in little memory", squeeze)])
    engine.close()


def compare(table: Table, ours: str, other: str) -> None:
    """Each row of one layout beside the other's."""
    others = {(row.model, row.work, row.batch, row.context): row for row in table.records if row.backend == other}
    for row in [row for row in table.records if row.backend == ours]:
        reference = others.get((row.model, row.work, row.batch, row.context))
        if reference is not None:
            table.compare(row, reference)


def main() -> int:
    parser = engine_parser(__doc__, "results/layouts")
    parser.set_defaults(max_num_seqs=512, max_model_len=36864)
    parser.add_argument("--little-bytes", default="8gb", help="of KV cache for the short requests, as 8gb")
    options = parse(parser, {"little_bytes": "2mb", "max_num_seqs": 16})
    sizes, table = SMALL if options.test else LITTLE, Table(options.output / "layouts.csv")
    megacache = f"{options.backend}_megacache"
    for backend in (options.backend, megacache):
        print(f"# {backend}", flush=True)
        measure(options, table, sizes, backend)
    compare(table, megacache, options.backend)
    draw_ratios(table.records, options.output / "layouts.png")
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
