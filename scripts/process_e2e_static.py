"""Makespans of static traces: a table, makespan.csv and a plot for each model and workload.

    python scripts/process_e2e_static.py [FOLDER]

What is run is in experiments/e2e_static.yml.
"""

import sys
from pathlib import Path

from sarathi.benchmark.experiment.command import process_experiment

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "e2e_static.yml"

if __name__ == "__main__":
    sys.exit(process_experiment(EXPERIMENT, __doc__))
