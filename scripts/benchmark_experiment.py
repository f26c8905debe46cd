"""Run an experiment of experiments/*.yml by its name, then make its table and figures.

    python scripts/benchmark_experiment.py NAME [--test] [--resume] [--model NAME ...] [--backends NAME ...] [--list]

Experiments are defined in experiments/*.yml.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, run_named_experiment

if __name__ == "__main__":
    sys.exit(run_named_experiment(EXPERIMENTS, __doc__))
