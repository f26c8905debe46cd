"""Measure offline makespans over models, backends, P:D ratios and contexts; results in experiments/e2e_static_eval.

    python scripts/benchmark_e2e_static_trace.py [--test] [--resume] [--model NAME ...] [--backends NAME ...]

experiments/e2e_static.yml configures the runs.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, run_experiment

if __name__ == "__main__":
    sys.exit(run_experiment(EXPERIMENTS / "e2e_static.yml", __doc__))
