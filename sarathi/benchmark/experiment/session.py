"""python -m sarathi.benchmark.experiment.session FOLDER ...: the runs that folders ask for, on one engine.

Each folder holds a config.yml, and they differ in their workload alone. Exit codes: those of sarathi.benchmark.main.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sarathi.benchmark.main import run_configs
from sarathi.benchmark.results import read_config


def main(words: Sequence[str] | None = None) -> int:
    """The worst exit code of the runs."""
    folders = sys.argv[1:] if words is None else words
    return run_configs(lambda: [read_config(Path(folder)) for folder in folders])


if __name__ == "__main__":
    sys.exit(main())
