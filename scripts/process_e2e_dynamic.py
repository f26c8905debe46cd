"""P50, P90 and P99 of normalized latency over load: a table, latency.csv and a plot of each.

    python scripts/process_e2e_dynamic.py [FOLDER]

What is run is in experiments/e2e_dynamic.yml.
"""

import sys
from pathlib import Path

from sarathi.benchmark.experiment.command import process_experiment

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "e2e_dynamic.yml"

if __name__ == "__main__":
    sys.exit(process_experiment(EXPERIMENT, __doc__))
