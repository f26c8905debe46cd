"""Shared command-line options of the benchmark scripts, and their YAML files.

program: allocator              # scripts/benchmark_allocator.py
base: {option: value, ...}
test: {base: {option: value}}   # what --test changes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sarathi.config.knobs import ConfigError
from sarathi.config.load import read_yaml
from sarathi.config.units import nearest, parse_bytes

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
_NOT_IN_FILES = ("figure", "output")
_TEST = {
    "model": "tiny", "backend": "sdpa_vattn", "device": "cpu", "memory_bytes": "64mb", "max_model_len": 512,
    "max_num_seqs": 8, "chunk_size": 64,
}  # fmt: skip


def engine_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """A parser with the options of every script that runs engines."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llama-3-8b", help="a shipped name; or tiny, two-wide-layers: random weights"
    )
    parser.add_argument("--backend", default="fa_vattn")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="devices that share each layer")
    parser.add_argument("--max-model-len", type=int, default=132_096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--memory-bytes", help="of the KV cache, as 8gb; none: what is free")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; nothing starts after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the CSV files and plots")
    parser.add_argument("--test", action="store_true", help="a short form on the CPU with a tiny model")
    return parser


def add_stages(parser: argparse.ArgumentParser, stages: Sequence[str]) -> None:
    """Add --stages: the stages to measure, in order; default: all."""

    def chosen(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [each for each in found if each not in stages]:
            raise argparse.ArgumentTypeError(f"no stage is called {', '.join(unknown)}; known: {', '.join(stages)}")
        return found

    parser.add_argument("--stages", type=chosen, default=list(stages), help=f"any of {','.join(stages)}")


def add_ratios(parser: argparse.ArgumentParser) -> None:
    """Add --ratios: the static traces to run; each takes minutes."""
    parser.add_argument(
        "--ratios", type=lambda text: [int(each) for each in text.split(",")], default=[500, 50],
        help="prompt tokens for one output token, of the static traces",
    )  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, test: Mapping[str, object] = MappingProxyType({}), program: str | None = None
) -> argparse.Namespace:
    """Parse the command line. Its options override those of --test, which override experiments/PROGRAM.yml.

    test: options that --test changes, in addition to model and device.
    """
    short = [word for name, value in {**_TEST, **test}.items() for word in as_words(name, [value])]
    if program is not None:
        return parse_with_file(parser, program, short=short)
    options = parser.parse_args()
    return parser.parse_args([*short, *sys.argv[1:]]) if options.test else options


def parse_with_file(
    parser: argparse.ArgumentParser, name: str, folder: Path = EXPERIMENTS, short: Sequence[str] = ()
) -> argparse.Namespace:
    """Parse the command line over the options of folder/NAME.yml, or of the file given by --figure.

    The file may set options with values, but not flags. short: words of --test, extended by test.base. Exits with an
    error that names file, key and allowed values if a key is unknown or missing, or a value is invalid.
    """
    shipped = folder / f"{name}.yml"
    parser.add_argument("--figure", type=Path, default=shipped, help="YAML of these options")
    parser.allow_abbrev = False
    given = parser.parse_args()
    parser.exit_on_error = False  # while the file is read
    try:
        words = _words(parser, given, _read(shipped, name), _read(given.figure, name), short)
    except ValueError as error:
        parser.error(f"{given.figure}: {error}")
    parser.exit_on_error = True
    return parser.parse_args([*words, *sys.argv[1:]])


def as_words(name: str, values: Sequence[object]) -> list[str]:
    """An option as command-line words."""
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def positive(text: str) -> int:
    """Type of an option: an integer of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be an integer, at least 1")
    return int(text)


def size_bytes(text: str) -> int:
    """Type of an option: bytes, as 2mb."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _read(path: Path, program: str) -> dict[str, Mapping[Any, Any]]:
    """The options of a file's sections base and test.base."""
    content = _mapping(read_yaml(path), "it")
    if unknown := set(content) - {"program", "base", "test"}:
        raise ConfigError(f"{unknown.pop()!r} is unknown; a program's file has program, base and test")
    if content.get("program") != program:
        raise ConfigError(f"program is {content.get('program')!r}: it must be {program!r}")
    test = _mapping(content.get("test", {}), "test")
    if set(test) - {"base"}:
        raise ConfigError(f"test has {', '.join(map(str, test))}: it must have base alone")
    return {"base": _mapping(content.get("base"), "base"), "test.base": _mapping(test.get("base", {}), "test.base")}


def _mapping(value: Any, name: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}: it must be a mapping")
    return value


def _words(
    parser: argparse.ArgumentParser, given: argparse.Namespace, shipped: Mapping[str, Mapping[Any, Any]],
    content: Mapping[str, Mapping[Any, Any]], short: Sequence[str],
) -> list[str]:  # fmt: skip
    """The file's options as command-line words; with --test, the short form's words last."""
    if missing := [key for key in shipped["base"] if key not in content["base"]]:
        raise ConfigError(f"base.{missing[0]} is missing; a file has {', '.join(shipped['base'])}")
    known = [key for key, value in vars(given).items() if not isinstance(value, bool) and key not in _NOT_IN_FILES]
    words, shorter = (list(_checked(parser, known, section, content[section])) for section in ("base", "test.base"))
    return [*words, *short, *shorter] if "test" in given and given.test else words


def _checked(
    parser: argparse.ArgumentParser, known: Sequence[str], section: str, content: Mapping[Any, Any]
) -> Iterator[str]:
    """The section's options, each parsed alone so that an error names one key."""
    for key, value in content.items():
        name = f"{section}.{key}"
        if key not in known:
            raise ConfigError(f"{name!r} is unknown; the nearest of {', '.join(known)} is {nearest(str(key), known)!r}")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in values):
            raise ConfigError(f"{name} is {value!r}: it must be text, a number, or a list of them")
        words = as_words(key, values)
        try:
            found, _ = parser.parse_known_args(words)
        except argparse.ArgumentError as error:
            raise ConfigError(f"{name} is {value!r}: {error}") from None
        if isinstance(value, list) and not isinstance(getattr(found, key), list):
            raise ConfigError(f"{name} is {value!r}: it must be one value")
        yield from words
