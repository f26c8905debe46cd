"""Measure the cost of on-demand memory: driver calls and the latency of every step of a long decode.

    python scripts/benchmark_allocator.py --output DIR

Requests of staggered lengths decode twice under background mapping and twice under synchronous mapping: first on
fresh memory, then on slots whose pages are all mapped, where the allocator has nothing to do. Their number and the
number of steps are in experiments/allocator.yml. Writes allocator.csv, which ends with the records of
`python -m vattention.bench`, and allocator_steps.csv with its figure.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sarathi.benchmark.config.program import engine_parser, parse, positive
from sarathi.benchmark.engines.load import Load
from sarathi.benchmark.engines.ours import OurEngine, open_engine
from sarathi.benchmark.engines.sizes import FULL, SMALL
from sarathi.benchmark.figures import draw
from sarathi.benchmark.records import Budget, Record, Table
from sarathi.entrypoints.script import run_script
from vattention import bench

WARM_UP_STEPS = 32  # of a decode, in which pages are created for the first time
SLACK_TOKENS = 128  # that a request may have got while others were still in their prompts
MAPPED = ", mapped before"


class Decodes:
    """Decode the same requests under one backend after the other, and record the latency of each step."""

    def __init__(self, options: argparse.Namespace, table: Table) -> None:
        self._options, self._table = options, table
        self.steps_ms: dict[str, list[float]] = {}
        self._rows: dict[tuple[str, str], Record] = {}

    @property
    def prompts(self) -> list[int]:
        """Prompts of staggered lengths, so that requests cross page boundaries one at a time, as in a server."""
        return [self._options.prompt + self._options.stagger * index for index in range(self._options.max_num_seqs)]

    def measure(self, backend: str) -> None:
        """Decode on fresh memory, then on mapped memory, of one engine."""
        engine = open_engine(self._options, backend)
        sizes = SMALL if self._options.test else FULL
        load = Load(engine, self._table, self._options.model, sizes, self._options.seed)
        load.warm_up()
        self._decode(load, engine, backend)
        longest = max(self.prompts) + WARM_UP_STEPS + self._options.steps + SLACK_TOKENS
        load.serve([(longest, 1)] * self._options.max_num_seqs)
        self._decode(load, engine, backend + MAPPED)
        engine.close()

    def _decode(self, load: Load, engine: OurEngine, name: str) -> None:
        produced = load.start_decoding(self.prompts, self._options.steps + WARM_UP_STEPS)
        load.timed(produced, WARM_UP_STEPS)
        before = engine.memory_stats()
        steps = load.timed(produced, self._options.steps)
        after = engine.memory_stats()
        load.end(produced)
        self.steps_ms[name] = steps
        for work, value, unit in summary(steps):
            self._record(name, work, value, unit)
        self._record(name, "steps that waited for a page", after.steps_waited - before.steps_waited, "steps")
        self._record(name, "driver calls", after.driver_calls - before.driver_calls, "calls")

    def _record(self, name: str, work: str, value: float, unit: str) -> None:
        options = self._options
        row = Record(options.model, work, name, options.max_num_seqs, options.prompt, value, unit)
        self._table.add(row)
        self._rows[work, name] = row

    def compare(self) -> None:
        """Compare the latencies on fresh memory with those on mapped memory, for each backend."""
        for (work, name), row in list(self._rows.items()):
            mapped = self._rows.get((work, name + MAPPED))
            if mapped is not None and row.unit == "ms":
                self._table.compare(row, mapped)
                self._record(name, f"{work}, added", row.value - mapped.value, "ms")


def summary(steps_ms: Sequence[float]) -> list[tuple[str, float, str]]:
    """Statistics of the steps: (name, value, unit)."""
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    found = {name: np.quantile(steps_ms, share, method="higher") for name, share in shares.items()}
    return [(f"decode step {name}", float(ms), "ms") for name, ms in {"mean": np.mean(steps_ms), **found}.items()]


def library_rows(table: Table, device: torch.device) -> None:
    """The library's own benchmark, section by section."""
    torch.empty(1, device=device)  # the CUDA context exists before anything is timed
    for section in bench.SECTIONS:
        for result in section(device):
            work = f"{result.section}, {result.case}: {result.metric}"
            table.add(Record("none", work, str(device), 1, 0, result.value, result.unit))


def save_steps(steps_ms: Mapping[str, Sequence[float]], path: Path) -> None:
    """The latency of every step, as a file and as a figure."""
    steps = [(name, step, ms) for name, times in steps_ms.items() for step, ms in enumerate(times)]
    pd.DataFrame(steps, columns=["backend", "step", "ms"]).to_csv(path, index=False, float_format="%.4f")
    draw(path)


def read_options() -> argparse.Namespace:
    parser = engine_parser(__doc__, "results/allocator")
    parser.add_argument("--steps", type=positive, help="decode steps that are measured")
    parser.add_argument("--prompt", type=positive, help="tokens of the shortest prompt")
    parser.add_argument("--stagger", type=int, help="tokens by which each prompt is longer than the one before")
    parser.add_argument("--skip-library", action="store_true", help="only the decodes")
    return parse(parser, program="allocator")


def main() -> int:
    options = read_options()
    table = Table(options.output / "allocator.csv")
    budget = Budget(options.budget, table.attempts)
    decodes = Decodes(options, table)
    backends = [options.backend, f"{options.backend}_sync"]
    budget.run((f"decode under {name}", partial(decodes.measure, name)) for name in backends)
    decodes.compare()
    save_steps(decodes.steps_ms, options.output / "allocator_steps.csv")
    if not options.skip_library:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        budget.run([("vattention.bench", partial(library_rows, table, device))])
    return table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
