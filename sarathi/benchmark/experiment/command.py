"""Command lines of experiments: run, and process results.

Exit codes: 0 all runs are complete; 1 a run failed or no run was found; 130 ^C.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.options import read_settings
from sarathi.benchmark.config.program import EXPERIMENTS as EXPERIMENTS
from sarathi.benchmark.experiment.collect import FinishedRun, collect
from sarathi.benchmark.experiment.execute import execute
from sarathi.benchmark.experiment.plan import Experiment, read_experiment
from sarathi.benchmark.experiment.tables import TABLES, make_table
from sarathi.benchmark.figures import ENVIRONMENT_FILE, draw
from sarathi.benchmark.run.processes import ended_by_signals
from sarathi.config.load import read_yaml
from sarathi.metrics.files import open_replacing

MODEL_AXIS, BACKEND_AXIS = "model.name", "model.attention_backend"
EXIT_INTERRUPTED = 130
HELP = ("-h", "--help")
EPILOG = "Any knob of a run can be given for all runs after --, as: -- --replica_scheduler.provider vllm"


def run_experiment(path: Path, description: str | None, words: Sequence[str] | None = None) -> int:
    """Run the experiment of a YAML file, then make its table."""
    own, knobs = _split(sys.argv[1:] if words is None else list(words))
    args = _run_parser(description).parse_args(own)
    try:
        experiment = _experiment(path, args, knobs)
        folder = Path(args.output or experiment.output_dir)
        runs = experiment.runs()
        if args.list:
            print("\n".join(run.name for run in runs))
            return 0
        with ended_by_signals():
            failures = execute(runs, folder, args.resume)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"{path.stem}: {error}", file=sys.stderr)
        return 1
    has_table = _process(experiment.table, folder) is not None
    for failure in failures:
        print(f"\n{failure.name} failed with exit code {failure.exit_code}:\n{failure.tail}", file=sys.stderr)
    print(f"{len(runs) - len(failures)} of {len(runs)} runs are complete")
    return 0 if has_table and not failures else 1


def process_experiment(path: Path, description: str | None, words: Sequence[str] | None = None) -> int:
    """Make table and figure of the runs in a folder."""
    args = _process_parser(description).parse_args(words)
    try:
        experiment = read_experiment(path, args.test)
    except (ValueError, OSError) as error:
        print(f"{path.stem}: {error}", file=sys.stderr)
        return 1
    broken = _process(experiment.table, Path(args.folder or experiment.output_dir))
    return 0 if broken == [] else 1


def run_named_experiment(folder: Path, description: str | None, words: Sequence[str] | None = None) -> int:
    """run_experiment for FOLDER/<first word>.yml, or the script that this file configures."""
    return _with_named(folder, words, _run_parser(description), run_experiment)


def process_named_experiment(folder: Path, description: str | None, words: Sequence[str] | None = None) -> int:
    """process_experiment for FOLDER/<first word>.yml."""
    return _with_named(folder, words, _process_parser(description), process_experiment)


def _with_named(
    folder: Path, words: Sequence[str] | None, parser: argparse.ArgumentParser, command: Callable[..., int]
) -> int:
    """Call `command` with the file that the first word names and the remaining words, or print the help."""
    name, *rest = sys.argv[1:] if words is None else words or [""]
    path = folder / f"{name}.yml"
    if path.is_file() and (script := script_of(path)):
        return subprocess.run([sys.executable, str(script), "--figure", str(path), *rest]).returncode
    if path.is_file():
        return command(path, parser.description, rest)
    known = ", ".join(sorted(each.stem for each in folder.glob("*.yml")))
    if name in HELP:
        parser.prog += " NAME"
        parser.epilog = f"NAME: {known}. {parser.epilog or ''}"
        parser.print_help()
        return 0
    print(f"experiment {name!r} is unknown; there are {known}", file=sys.stderr)
    return 1


def script_of(path: Path) -> Path | None:
    """The script that a file configures (key `program`); None for a grid of runs."""
    content = read_yaml(path)
    name = content.get("program") if isinstance(content, Mapping) else None
    return path.parents[1] / "scripts" / f"benchmark_{name}.py" if name else None


def _process_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", nargs="?", help="where the runs are; default: the experiment's own folder")
    parser.add_argument("--test", action="store_true", help="by default the folder of the runs of --test")
    return parser


def _run_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, epilog=EPILOG)
    add = parser.add_argument
    add("--test", action="store_true", help="a minute's run with the small model, on any machine")
    add("--resume", action="store_true", help="leave out runs that are complete already")
    add("--model", nargs="+", metavar="NAME", help="these models; or as A,B")
    add("--backends", nargs="+", metavar="NAME", help="these backends; or as A,B")
    add("--axis", action="append", default=[], metavar="NAME=A,B", help="these labels of an axis; repeatable")
    add("--output", metavar="FOLDER", help="where results go; default: as the YAML file says")
    add("--list", action="store_true", help="name the runs, and do nothing")
    return parser


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words at --: the script's own, and knobs."""
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
    """Print and write the table. Returns the runs that are left out; None if there is no complete run."""
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
    """Write the table and its figure, and print the table."""
    path, records = folder / f"{table}.csv", make_table(TABLES[table], runs)
    with open_replacing(path) as file:
        records.to_csv(file, index=False)
    with open_replacing(folder / ENVIRONMENT_FILE) as file:
        file.write(json.dumps(environments(runs), indent=2) + "\n")
    known = records.dropna(axis="columns", how="all")
    print(known.to_string(index=False, na_rep="", float_format="{:.4g}".format))
    draw(path)


def environments(runs: Sequence[FinishedRun]) -> list[Mapping[str, Any]]:
    """The distinct environments of the runs: --resume may continue on another revision or machine."""
    found = [run.summary.get("environment", {}) for run in runs]
    return [each for index, each in enumerate(found) if each not in found[:index]]
