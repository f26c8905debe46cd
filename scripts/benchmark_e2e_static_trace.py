"""Offline makespan over models, backends, P:D ratios and context lengths; results under experiments/e2e_static_eval.

    python scripts/benchmark_e2e_static_trace.py [--test] [--resume] [--model NAME ...] [--backends NAME ...]

What is run is in experiments/e2e_static.yml.
"""

import sys
from pathlib import Path

from sarathi.benchmark.experiment.command import run_experiment

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "e2e_static.yml"

if __name__ == "__main__":
    sys.exit(run_experiment(EXPERIMENT, __doc__))
