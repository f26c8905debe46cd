"""Lends these tests the engine over a model of a few lines that the engine's own tests use."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "engine"))
