"""Plot the KV cache's memory over the steps of several runs.

    python scripts/plot_memory.py RUN_FOLDER... --output memory.csv

Each folder is the output of `sarathi bench run` with `--metrics_store.memory_interval_steps 1`. Writes a CSV file of
all runs and a figure: bytes used by tokens, wasted, idle and held in total.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from sarathi.benchmark.figures import draw
from sarathi.entrypoints.script import run_script
from sarathi.metrics.report import TABLES_FOLDER
from sarathi.metrics.tables import MEMORY_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("memory.csv"), help="named memory.csv, for its figure")
    options = parser.parse_args()
    runs = pd.concat([read_run(folder) for folder in options.folders], ignore_index=True)
    runs.to_csv(options.output, index=False, lineterminator="\n")
    draw(options.output)
    return 0


def read_run(folder: Path) -> pd.DataFrame:
    """One record per step: model, backend, step, bytes."""
    summary = json.loads((folder / "summary.json").read_text())
    facts = {"model": summary["config"]["model"]["name"], "backend": summary["engine"]["backend"]}
    frame = pd.read_csv(folder / TABLES_FOLDER / "memory_metrics.csv")[[*MEMORY_BYTES]]
    return frame.assign(**facts, step=range(len(frame)))[[*facts, "step", *MEMORY_BYTES]]


if __name__ == "__main__":
    sys.exit(run_script(main))
