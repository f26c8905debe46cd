"""Scripts and commands as processes with one torch thread, and what every run of a benchmark leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from sarathi.metrics.report import TABLES_FOLDER
from sarathi.metrics.tables import BATCH_COUNTS, BATCH_TIMES, REQUEST_COUNTS, REQUEST_TIMES

ROOT = Path(__file__).parents[2]
# glibc gives large tensors back to the system, which maps and zeroes them anew in each step: 5-12 % of a short run.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **KEEP_FREED_MEMORY}


def command(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs to its end; shows all that was said where the exit code is another."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def script(name: str, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return command(sys.executable, ROOT / "scripts" / name, *words, code=code)


def check_run(folder: Path) -> dict:
    """A run's files and columns; its summary."""
    requests = pd.read_csv(folder / TABLES_FOLDER / "sequence_metrics.csv")
    assert list(requests.columns) == ["Request Id", *REQUEST_TIMES, *REQUEST_COUNTS]
    assert list(pd.read_csv(folder / TABLES_FOLDER / "batch_metrics.csv").columns) == [
        "Batch Id",
        *BATCH_COUNTS,
        *BATCH_TIMES,
    ]
    assert (pd.read_csv(folder / TABLES_FOLDER / "memory_metrics.csv")["kv_mapped_bytes"] > 0).any()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ended"] == "completed" and summary["num_completed"] == len(requests) > 0
    assert requests[list(REQUEST_TIMES)].notna().all().all()
    assert summary["environment"]["packages"]["torch"] and (folder / "config.yml").is_file()
    return summary
