"""Makespans of static traces: a table, makespan.csv and a plot for each model and workload.

    python scripts/process_e2e_static.py [FOLDER]

What is run is in experiments/e2e_static.yml.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, process_experiment

if __name__ == "__main__":
    sys.exit(process_experiment(EXPERIMENTS / "e2e_static.yml", __doc__))
