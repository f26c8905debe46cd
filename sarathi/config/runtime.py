"""Where processes of one user find each other."""

import os
import tempfile
from pathlib import Path


def runtime_folder() -> Path:
    """A folder of this user alone: in XDG_RUNTIME_DIR, or in the folder for temporary files. Made where it is missing.

    PermissionError where another user has made it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "sarathi" if base else Path(tempfile.gettempdir()) / f"sarathi-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder
