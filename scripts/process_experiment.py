"""Make the table and figures of an experiment's finished runs.

    python scripts/process_experiment.py NAME [FOLDER]

Experiments are defined in experiments/*.yml.
"""

import sys

from sarathi.benchmark.experiment.command import EXPERIMENTS, process_named_experiment

if __name__ == "__main__":
    sys.exit(process_named_experiment(EXPERIMENTS, __doc__))
