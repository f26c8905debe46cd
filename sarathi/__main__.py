"""`python -m sarathi` is the `sarathi` command, also where its script is not on the path."""

import sys

from sarathi.entrypoints.cli import main

if __name__ == "__main__":
    sys.exit(main())
