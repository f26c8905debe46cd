"""Exit code and one-line errors of a script."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_WRONG_USE = 2  # as in argparse


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the result of `main`, or print the error and exit with 2 if a value, file or package is wrong."""
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(_WRONG_USE)
