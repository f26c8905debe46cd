"""How a script ends: its exit code, and one line about an error that its user can correct."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_WRONG_USE = 2  # as argparse has it


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with what `main` returns, or with 2 and the error where a value, file or package is wrong."""
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(_WRONG_USE)
