"""Memory of the KV cache over the steps of several runs, side by side.

    python scripts/plot_memory.py RUN_FOLDER... --output memory.csv

Each folder is one that `sarathi bench run` wrote, with `--metrics_store.memory_interval_steps 1`. Writes a CSV file of
all runs and a figure beside it: bytes of tokens, wasted behind them, idle for the next request, and mapped in all.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from sarathi.entrypoints.script import run_script
from sarathi.metrics.plots import LIGHT, OURS, Panels

COLUMNS = ["kv_mapped_bytes", "kv_wasted_bytes", "kv_idle_bytes"]
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("memory.csv"), help="the CSV file; the figure ends in .png")
    options = parser.parse_args()
    runs = pd.concat([read_run(folder) for folder in options.folders], ignore_index=True)
    runs.to_csv(options.output, index=False, lineterminator="\n")
    plot(runs, options.output.with_suffix(".png"))
    return 0


def read_run(folder: Path) -> pd.DataFrame:
    """One line a step: backend, step, bytes."""
    engine = json.loads((folder / "summary.json").read_text())["engine"]
    frame = pd.read_csv(folder / "memory_metrics.csv")[COLUMNS]
    return frame.assign(backend=engine["backend"], step=range(len(frame)))[["backend", "step", *COLUMNS]]


def plot(runs: pd.DataFrame, path: Path) -> None:
    """A panel a backend, all on one scale."""
    panels = Panels(columns=runs["backend"].nunique(), width=3.6, heights=(3.0,))
    top = runs["kv_mapped_bytes"].max() / MIB * 1.1
    for axis, (backend, run) in zip(panels.axes, runs.groupby("backend", sort=False), strict=True):
        mapped, wasted, idle = (run[column] / MIB for column in COLUMNS)
        bands = [mapped - idle - wasted, wasted, idle]
        axis.stackplot(run["step"], bands, colors=["0.8", "tab:orange", LIGHT], labels=["tokens", "wasted", "idle"])
        axis.plot(run["step"], mapped, color=OURS, linewidth=1, label="mapped")
        axis.set(title=backend, xlabel="step", ylabel="MiB of KV cache", ylim=(0, top))
    panels.legend(panels.axes[0])
    panels.save(path, "24 requests of SmolLM2-135M, at most 8 at once, on a CPU")


if __name__ == "__main__":
    sys.exit(run_script(main))
