"""Make the table, makespan.csv and plots of static traces' makespans by model and workload.

    python scripts/process_e2e_static.py [FOLDER]

experiments/e2e_static.yml configures the runs.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, process_experiment

if __name__ == "__main__":
    sys.exit(process_experiment(EXPERIMENTS / "e2e_static.yml", __doc__))
