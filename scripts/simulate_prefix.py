"""Simulate prefix caching on a trace with shared prefixes, and record hit rates: prefix_simulation.csv.

    python scripts/simulate_prefix.py --output DIR [--trace conversation_trace.jsonl] [--requests 2000]

Uses the engine's scheduler, prefix index, block manager and allocator, without a model. Without --trace, requests
follow the published statistics of Mooncake's conversation trace. Capacities are fractions of all distinct tokens.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from sarathi.benchmark.engines.simulation import SimulatedCache, distinct_tokens, simulate, with_short_outputs
from sarathi.benchmark.workload.json_lines import read_json_lines
from sarathi.benchmark.workload.mooncake_shape import mooncake_like
from sarathi.config.schema import EVICTIONS
from sarathi.entrypoints.console import format_table
from sarathi.entrypoints.script import run_script

HEADER = ("capacity", "tokens", "policy", "hit rate", "of a cache without limits", "ratio")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trace", type=Path, help="Mooncake or Qwen-Bailian JSON lines")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--capacities", type=float, nargs="+", default=[1.2, 0.5, 0.25, 0.1])
    parser.add_argument("--policies", nargs="+", choices=EVICTIONS, default=list(EVICTIONS))
    parser.add_argument("--output-divisor", type=int, default=16, help="outputs are shortened by this factor")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = read_options()
    made = mooncake_like(options.requests, np.random.default_rng(options.seed))
    specs = read_json_lines(options.trace)[: options.requests] if options.trace else made
    specs = with_short_outputs(specs, options.output_divisor)
    longest = max(spec.num_tokens for spec in specs)
    records = []
    for share in options.capacities:
        tokens = max(int(share * distinct_tokens(specs)), 2 * longest)
        for policy in options.policies:
            reuse = simulate(specs, SimulatedCache(tokens, policy))
            found, ideal = (count / reuse.num_prompt_tokens for count in (reuse.num_found, reuse.num_repeated))
            records.append((f"{share:g}", str(tokens), policy, f"{found:.4f}", f"{ideal:.4f}", f"{found / ideal:.4f}"))
            print(*records[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "prefix_simulation.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *records])
    print(format_table(HEADER, records))
    return 0


if __name__ == "__main__":
    run_script(main)
