"""Measure prompts with shared prefixes in our engine and in vLLM: prefix.csv.

    python scripts/benchmark_prefix.py --model llama-3-8b --output DIR [--backends fa_vattn_megacache fa_vattn]
        [--no-cascade]
    python scripts/benchmark_prefix.py --vllm --model llama-3-8b --output OTHER       # where vllm can be imported
    python scripts/benchmark_prefix.py --join DIR/prefix.csv OTHER/prefix.csv --output JOINED

The same prompts for all engines: 256 requests over one prefix of 4,096 tokens; 64 conversations of 6 turns; 8 documents
of 32,768 tokens with 48 questions at once, 48 to known documents, and the first token of one more. Stage `unshared` has
short requests without a common prefix, with prefix caching on and off: the cost of the index without hits.
"""

import argparse
import os
import sys
from pathlib import Path

from sarathi.benchmark.config.program import add_stages, engine_parser, parse, positive
from sarathi.benchmark.engines.load import Engine, Load
from sarathi.benchmark.engines.ours import open_engine
from sarathi.benchmark.engines.prefixes import FULL, SMALL, STAGES, PrefixLoad
from sarathi.benchmark.engines.sizes import FULL as FULL_LOAD
from sarathi.benchmark.engines.sizes import SMALL as SMALL_LOAD
from sarathi.benchmark.records import Budget, Table, join_engines
from sarathi.entrypoints.script import run_script

UNSHARED = "unshared"


def measure_ours(options: argparse.Namespace, table: Table, budget: Budget, backend: str) -> None:
    """Run every stage with prefix caching, in one engine."""
    engine = open_engine(options, backend, prefix_caching=True, cascade_attention=not options.no_cascade)
    if options.no_cascade:
        engine.backend = f"{backend}, no cascade"
    load = _load(options, engine, table)
    load.warm_up()
    shared = PrefixLoad(load, SMALL if options.test else FULL)
    budget.run(shared.plan([stage for stage in options.stages if stage != UNSHARED]))
    engine.close()


def measure_unshared(options: argparse.Namespace, table: Table, budget: Budget, backend: str) -> None:
    """Alternate short requests with and without prefix caching, in new engines; records the medians of the rounds."""
    samples = Table(options.output / "unshared_samples.csv", table.attempts)
    names = {True: backend, False: f"{backend}, caching off"}
    for number in range(options.rounds):
        for caching in (False, True)[:: -1 if number % 2 else 1]:
            engine = open_engine(options, backend, prefix_caching=caching)
            engine.backend = names[caching]
            load = _load(options, engine, samples)
            load.warm_up()
            budget.run((name, work) for name, work in load.plan(["requests"]) if options.only in name)
            engine.close()
    table.add_medians([record for record in samples.records if record.backend in names.values()], backend)


def _load(options: argparse.Namespace, engine: Engine, table: Table) -> Load:
    return Load(engine, table, options.model, SMALL_LOAD if options.test else FULL_LOAD, options.seed)


def measure_vllm(options: argparse.Namespace, table: Table, budget: Budget) -> None:
    from sarathi.benchmark.engines.vllm import VllmEngine

    engine = VllmEngine(options.model, options.max_model_len, options.seed, prefix_caching=True)
    load = _load(options, engine, table)
    load.warm_up()
    budget.run(PrefixLoad(load, FULL).plan([stage for stage in options.stages if stage in STAGES]))


def read_options() -> argparse.Namespace:
    parser = engine_parser(__doc__, "results/prefix")
    parser.set_defaults(max_model_len=36864)
    add_stages(parser, (*STAGES, UNSHARED))
    parser.add_argument("--backends", nargs="+", default=["fa_vattn_megacache"])
    parser.add_argument("--no-cascade", action="store_true", help="each request reads what it shares with others")
    parser.add_argument("--rounds", type=positive, default=2, help="engines with and without caching, of `unshared`")
    parser.add_argument("--only", default="", help="what the names of requests of `unshared` contain, as 1000")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM instead")
    parser.add_argument("--join", type=Path, nargs=2, metavar=("OURS", "THEIRS"), help="two CSV files instead")
    return parse(parser, {"backends": "sdpa_vattn"})


def main() -> int:
    options = read_options()
    if options.join:
        join_engines(*options.join, options.output / "prefix.csv")
        return 0
    table = Table(options.output / "prefix.csv")
    budget = Budget(options.budget, table.attempts)
    if options.vllm:
        measure_vllm(options, table, budget)
        sys.stdout.flush()
        os._exit(table.attempts.exit_code())  # vLLM's own shutdown may never return
    for backend in options.backends:
        if UNSHARED in options.stages:
            measure_unshared(options, table, budget, backend)
        if options.stages != [UNSHARED]:
            measure_ours(options, table, budget, backend)
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
