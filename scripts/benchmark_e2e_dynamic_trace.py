"""Online latency over load, arXiv lengths and Poisson arrivals; results under experiments/e2e_dynamic_eval.

    python scripts/benchmark_e2e_dynamic_trace.py [--test] [--resume] [--model NAME ...] [--backends NAME ...]

What is run is in experiments/e2e_dynamic.yml.
"""

import sys
from pathlib import Path

from sarathi.benchmark.experiment.command import run_experiment

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "e2e_dynamic.yml"

if __name__ == "__main__":
    sys.exit(run_experiment(EXPERIMENT, __doc__))
