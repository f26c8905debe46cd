"""Measure online latency over load with arXiv lengths and Poisson arrivals; results in experiments/e2e_dynamic_eval.

    python scripts/benchmark_e2e_dynamic_trace.py [--test] [--resume] [--model NAME ...] [--backends NAME ...]

experiments/e2e_dynamic.yml configures the runs.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, run_experiment

if __name__ == "__main__":
    sys.exit(run_experiment(EXPERIMENTS / "e2e_dynamic.yml", __doc__))
