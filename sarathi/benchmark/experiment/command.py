"""The two command lines of every experiment: run it, process it. Scripts hold nothing but a call of these.

Exit codes: 0 all runs are complete; 1 a run failed or nothing was found; 130 ^C ended it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sarathi.benchmark.config.options import read_settings
from sarathi.benchmark.experiment.collect import FinishedRun, collect
from sarathi.benchmark.experiment.execute import Failure, execute
from sarathi.benchmark.experiment.measures import Row
from sarathi.benchmark.experiment.plan import Experiment, read_experiment
from sarathi.benchmark.experiment.tables import IDENTITY, TABLES, draw, make_rows
from sarathi.metrics.files import write_table
from sarathi.metrics.plots import is_available
from sarathi.metrics.tables import Table

MODEL_AXIS, BACKEND_AXIS = "model.name", "model.attention_backend"
ENVIRONMENT_FILE = "environment.json"
EXIT_INTERRUPTED = 130
HELP = ("-h", "--help")
EPILOG = "Any knob of a run can be given for all runs after --, as: -- --replica_scheduler.provider vllm"


def run_experiment(path: Path, description: str, words: Sequence[str] | None = None) -> int:
    """Run the experiment of a YAML file, and then its table."""
    own, knobs = _split(sys.argv[1:] if words is None else list(words))
    args = _run_parser(description).parse_args(own)
    try:
        experiment = _experiment(path, args, knobs)
        folder = Path(args.output or experiment.output_dir)
        runs = experiment.runs()
        if args.list:
            print("\n".join(run.name for run in runs))
            return 0
        failures = execute(runs, folder, args.resume)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"{path.stem}: {error}", file=sys.stderr)
        return 1
    has_table = _process(experiment.table, folder) is not None
    _tell(failures, len(runs))
    return 0 if has_table and not failures else 1


def process_experiment(path: Path, description: str, words: Sequence[str] | None = None) -> int:
    """The table and the plots of runs that are there."""
    args = _process_parser(description).parse_args(words)
    try:
        experiment = read_experiment(path, args.test)
    except (ValueError, OSError) as error:
        print(f"{path.stem}: {error}", file=sys.stderr)
        return 1
    broken = _process(experiment.table, Path(args.folder or experiment.output_dir))
    return 0 if broken == [] else 1


def run_named_experiment(folder: Path, description: str, words: Sequence[str] | None = None) -> int:
    """The same for <first word>.yml of a folder."""
    command = partial(run_experiment, description=description)
    return _with_named(folder, words, _run_parser(description), command)


def process_named_experiment(folder: Path, description: str, words: Sequence[str] | None = None) -> int:
    """The same for <first word>.yml of a folder."""
    return _with_named(
        folder, words, _process_parser(description), partial(process_experiment, description=description)
    )


def _with_named(
    folder: Path, words: Sequence[str] | None, parser: argparse.ArgumentParser, command: Callable[..., int]
) -> int:
    """`command`, of this parser, with the file that the first word names and the words after it; or its help."""
    given = list(sys.argv[1:] if words is None else words)
    name, rest = (given[0], given[1:]) if given else ("", [])
    path = folder / f"{name}.yml"
    if path.is_file() and (script := script_of(path)):
        return subprocess.run([sys.executable, str(script), "--figure", str(path), *rest]).returncode
    if path.is_file():
        return command(path, words=rest)
    known = ", ".join(sorted(each.stem for each in folder.glob("*.yml")))
    if name in HELP:
        parser.prog += " NAME"
        parser.epilog = f"NAME: {known}. {parser.epilog or ''}"
        parser.print_help()
        return 0
    print(f"experiment {name!r} is unknown; there are {known}", file=sys.stderr)
    return 1


def script_of(path: Path) -> Path | None:
    """The script that a file gives options to (its key `program`); None for a grid of runs."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = content.get("program") if isinstance(content, Mapping) else None
    return path.parents[1] / "scripts" / f"benchmark_{name}.py" if name else None


def _process_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", nargs="?", help="where the runs are; default: the experiment's own folder")
    parser.add_argument("--test", action="store_true", help="by default the folder of the runs of --test")
    return parser


def _run_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, epilog=EPILOG)
    parser.add_argument("--test", action="store_true", help="a minute's run with the small model, on any machine")
    parser.add_argument("--resume", action="store_true", help="leave out runs that are complete already")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="these models; or as A,B")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="these backends; or as A,B")
    parser.add_argument(
        "--axis", action="append", default=[], metavar="NAME=A,B", help="these labels of an axis; repeatable"
    )
    parser.add_argument("--output", metavar="FOLDER", help="where results go; default: as the YAML file says")
    parser.add_argument("--list", action="store_true", help="name the runs, and do nothing")
    return parser


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A script's own words, and knobs after --."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _experiment(path: Path, args: argparse.Namespace, knobs: list[str]) -> Experiment:
    experiment = read_experiment(path, args.test).with_base(read_settings(knobs))
    chosen = [word.partition("=")[::2] for word in args.axis]
    chosen += [(MODEL_AXIS, ",".join(args.model))] if args.model else []
    chosen += [(BACKEND_AXIS, ",".join(args.backends))] if args.backends else []
    for name, labels in dict(chosen).items():
        experiment = experiment.with_axis(name, labels.split(","))
    return experiment


def _process(table: str, folder: Path) -> list[Path] | None:
    """Prints and writes; the runs that are left out, or None where there is no table."""
    runs, broken = collect(folder)
    for place in broken:
        print(f"incomplete, left out: {place}", file=sys.stderr)
    if not runs:
        print(f"{folder}: no complete run", file=sys.stderr)
        return None
    try:
        _write(table, runs, folder)
    except (ValueError, OSError) as error:
        print(f"{folder}: no table: {error}", file=sys.stderr)
        return None
    return broken


def _write(table: str, runs: Sequence[FinishedRun], folder: Path) -> None:
    """The table, as a file and for people, and the plots."""
    rows = make_rows(TABLES[table], runs)
    columns = (*IDENTITY, *[name for name in rows[0] if name not in IDENTITY])
    write_table(folder / f"{table}.csv", Table(columns, rows))
    (folder / ENVIRONMENT_FILE).write_text(json.dumps(environments(runs), indent=2) + "\n", encoding="utf-8")
    print(as_text(columns, rows))
    if is_available():
        draw(TABLES[table], runs, rows, folder)


def environments(runs: Sequence[FinishedRun]) -> list[Mapping[str, Any]]:
    """Each environment that a run had, once: --resume goes on with whatever code and machine there are by then."""
    found: list[Mapping[str, Any]] = []
    for run in runs:
        environment = run.summary.get("environment", {})
        if environment not in found:
            found.append(environment)
    return found


def as_text(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table for people: columns as wide as their widest cell."""
    cells = [list(columns), *[[_cell(row.get(name)) for name in columns] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _tell(failures: Sequence[Failure], total: int) -> None:
    for failure in failures:
        print(f"\n{failure.name} failed with exit code {failure.exit_code}:\n{failure.tail}", file=sys.stderr)
    print(f"{total - len(failures)} of {total} runs are complete")
