"""The folder in which processes of one user find each other."""

import os
import tempfile
from pathlib import Path


def runtime_folder() -> Path:
    """The private folder of this user, created if missing: in XDG_RUNTIME_DIR, or else in the temporary folder.

    Raises PermissionError if it belongs to another user.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "sarathi" if base else Path(tempfile.gettempdir()) / f"sarathi-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder
