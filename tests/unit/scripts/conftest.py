"""The scripts' shared modules are found as the scripts find them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
