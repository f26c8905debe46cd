"""P50, P90 and P99 of normalized latency over load: a table, latency.csv and a plot of each.

    python scripts/process_e2e_dynamic.py [FOLDER]

What is run is in experiments/e2e_dynamic.yml.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, process_experiment

if __name__ == "__main__":
    sys.exit(process_experiment(EXPERIMENTS / "e2e_dynamic.yml", __doc__))
