"""vLLM on the work of benchmark_engine.py, measured by the same code: vllm.csv; and both side by side: peer.csv.

    python scripts/benchmark_peer.py --model llama-3-8b --output DIR            # where vllm can be imported
    python scripts/benchmark_peer.py --join OURS/engine.csv DIR/vllm.csv --output DIR

Run both engines on one machine, one after the other: the ratio of a row is that of the two runs.
"""

import argparse
import os
import sys
from pathlib import Path

from measurement.device import device_work
from measurement.lengths import FULL
from measurement.options import add_ratios, add_stages
from measurement.plot import draw_ratios
from measurement.serving import STAGES, Load, process_age_s
from measurement.table import NEITHER_BETTER, Attempts, Budget, Row, Table, read_rows

from sarathi.entrypoints.script import run_script


def measure(options: argparse.Namespace) -> int:
    """All rows of vLLM; the exit code."""
    from measurement.peer import PeerEngine

    attempts = Attempts()
    budget = Budget(options.budget, attempts)
    engine = PeerEngine(options.model, options.max_model_len, options.seed)
    table, sizes = Table(options.output / "vllm.csv", attempts, peer=engine.backend), FULL.with_ratios(options.ratios)
    load = Load(engine, table, options.model, sizes, options.seed)
    load.start(process_age_s)
    budget.run(load.plan([stage for stage in options.stages if stage in STAGES]))
    if "device" in options.stages:
        budget.run(device_work(load))
    return attempts.exit_code()


def join(ours: Path, theirs: Path, output: Path) -> None:
    """Each of our rows that the peer has too beside the peer's, which follows it."""
    peers, mine = {_work(row): row for row in read_rows(theirs)}, list(read_rows(ours))
    table = Table(output / "peer.csv", ours=str(ours), theirs=str(theirs))
    for row in mine:
        peer = peers.get(_work(row))
        if peer is not None and "alone" not in row.backend:
            table.add(row if row.unit in NEITHER_BETTER else row.beside(peer))
            table.add(peer)
    draw_ratios(table.rows, output / "peer.png")


def _work(row: Row) -> tuple[object, ...]:
    return row.model, row.work, row.batch, row.context, row.unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help="a shipped name")
    add_stages(parser, (*STAGES, "device"))
    add_ratios(parser)
    parser.add_argument("--max-model-len", type=int, default=132_096)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; nothing starts after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/peer"))
    parser.add_argument("--join", type=Path, nargs=2, metavar=("OURS", "THEIRS"), help="two CSV files instead")
    options = parser.parse_args()
    if options.join:
        join(*options.join, options.output)
        return
    exit_code = measure(options)
    sys.stdout.flush()
    os._exit(exit_code)  # vLLM's own shutdown may wait for ever


if __name__ == "__main__":
    run_script(main)
