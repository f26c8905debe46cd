"""Measure vLLM on the workloads of benchmark_engine.py: vllm_alone.csv; joined with our records: vllm.csv.

    python scripts/benchmark_vllm.py --model llama-3-8b --output DIR            # where vllm can be imported
    python scripts/benchmark_vllm.py --join OURS/engine.csv DIR/vllm_alone.csv --output DIR

Run both engines on the same machine, one after the other: ratios compare these two runs.
"""

import argparse
import os
import sys
from pathlib import Path

from sarathi.benchmark.config.program import add_ratios, add_stages, positive
from sarathi.benchmark.engines.device import device_work
from sarathi.benchmark.engines.load import STAGES, Load
from sarathi.benchmark.engines.sizes import FULL
from sarathi.benchmark.figures import draw
from sarathi.benchmark.records import Budget, Table, join_engines
from sarathi.benchmark.revisions.worker import process_age_s
from sarathi.entrypoints.script import run_script


def measure(options: argparse.Namespace) -> int:
    """Measure the chosen stages of vLLM; returns the exit code."""
    from sarathi.benchmark.engines.vllm import VllmEngine

    engine = VllmEngine(options.model, options.max_model_len, options.seed, options.tensor_parallel_size)
    table = Table(options.output / "vllm_alone.csv", vllm=engine.backend)
    load = Load(engine, table, options.model, FULL.with_ratios(options.ratios), options.seed)
    budget = Budget(options.budget, table.attempts)
    load.start(process_age_s)
    budget.run(load.plan([stage for stage in options.stages if stage in STAGES]))
    if "device" in options.stages:
        budget.run(device_work(load))
    return table.attempts.exit_code()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="a shipped name")
    add_stages(parser, (*STAGES, "device"))
    add_ratios(parser)
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="devices that share each layer")
    parser.add_argument("--max-model-len", type=int, default=132_096)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; nothing starts after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/vllm"))
    parser.add_argument("--join", type=Path, nargs=2, metavar=("OURS", "THEIRS"), help="two CSV files instead")
    options = parser.parse_args()
    if options.join:
        join_engines(*options.join, options.output / "vllm.csv")
        draw(options.output / "vllm.csv")
        return
    exit_code = measure(options)
    sys.stdout.flush()
    os._exit(exit_code)  # vLLM's own shutdown may never return


if __name__ == "__main__":
    run_script(main)
