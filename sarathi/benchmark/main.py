"""python -m sarathi.benchmark.main [--config FILE] [--knob value ...]: one run, its files and a few lines of result.

Exit codes: 0 the run completed; 1 an error; 2 some requests were refused, or the time limit ended it; 130 ^C did.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from sarathi.benchmark.config.document import default_yaml
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.outcome import COMPLETED, INTERRUPTED
from sarathi.benchmark.replicas import ReplicaError, run_all
from sarathi.benchmark.results import describe_run, write_results

EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED = 1, 2, 130
USAGE = "python -m sarathi.benchmark.main [--config FILE] [--knob value ...]\n\nKnobs, their defaults and meanings:\n"


def main(words: Sequence[str] | None = None) -> int:
    """One run; its exit code."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        print(USAGE + default_yaml())
        return 0
    try:
        config = parse_options(words)
        logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        summary = write_results(config, run_all(config))
    except (ValueError, ReplicaError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return EXIT_ERROR
    print(describe_run(summary))
    print(f"results: {config.output_dir}")
    if summary["ended"] == INTERRUPTED:
        return EXIT_INTERRUPTED
    return 0 if summary["ended"] == COMPLETED and not summary["refused"] else EXIT_INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
