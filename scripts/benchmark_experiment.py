"""Any experiment of experiments/*.yml by its name: its runs, then its table and plots.

    python scripts/benchmark_experiment.py NAME [--test] [--resume] [--model NAME ...] [--backends NAME ...] [--list]

What there is to run is in experiments/*.yml.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, run_named_experiment

if __name__ == "__main__":
    sys.exit(run_named_experiment(EXPERIMENTS, __doc__))
