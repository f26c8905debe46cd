"""Make the table, latency.csv and plots of normalized latency (P50, P90, P99) over load.

    python scripts/process_e2e_dynamic.py [FOLDER]

experiments/e2e_dynamic.yml configures the runs.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, process_experiment

if __name__ == "__main__":
    sys.exit(process_experiment(EXPERIMENTS / "e2e_dynamic.yml", __doc__))
