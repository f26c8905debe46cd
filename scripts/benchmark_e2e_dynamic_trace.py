"""Online latency over load, arXiv lengths and Poisson arrivals; results under experiments/e2e_dynamic_eval.

    python scripts/benchmark_e2e_dynamic_trace.py [--test] [--resume] [--model NAME ...] [--backends NAME ...]

What is run is in experiments/e2e_dynamic.yml.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, run_experiment

if __name__ == "__main__":
    sys.exit(run_experiment(EXPERIMENTS / "e2e_dynamic.yml", __doc__))
