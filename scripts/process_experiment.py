"""Table and plots of an experiment's runs that are there already.

    python scripts/process_experiment.py NAME [FOLDER]

What there is to run is in experiments/*.yml.
"""

import sys
from pathlib import Path

from sarathi.benchmark.experiment.command import process_named_experiment

FOLDER = Path(__file__).parents[1] / "experiments"

if __name__ == "__main__":
    sys.exit(process_named_experiment(FOLDER, __doc__))
