"""Redraw figures: NAME.png next to each NAME.csv that has one.

python scripts/draw_figures.py FILE_OR_FOLDER ...        # folders with all below them
"""

import argparse
from pathlib import Path

from sarathi.benchmark.figures import draw
from sarathi.entrypoints.script import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    for place in parser.parse_args().places:
        for path in sorted(place.rglob("*.csv")) if place.is_dir() else [place]:
            draw(path)


if __name__ == "__main__":
    run_script(main)
