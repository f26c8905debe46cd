"""What a figure's script measures, read from YAML as if it stood on the command line. Knows no script and no option."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sarathi.config.knobs import ConfigError
from sarathi.config.units import nearest, parse_bytes

FIGURES = Path(__file__).parents[2] / "experiments" / "scripts"
_NOT_MEASURED = ("figure", "output")


def parse_figure(
    parser: argparse.ArgumentParser, name: str, figures: Path = FIGURES, short: Sequence[str] = ()
) -> argparse.Namespace:
    """The options: those of figures/NAME.yml, or of another file with the same keys, and over them the command line's.

    Options with values may stand in the file, flags may not. In a section `test` stands what the short form changes, of
    scripts that have one, beside `short`, words that all short forms have in common. A key that is unknown or missing,
    and a value that an option does not take, end the program with an error that names the file, the key, and what is
    allowed.
    """
    shipped = figures / f"{name}.yml"
    parser.add_argument("--figure", type=Path, default=shipped, help="YAML of these options")
    parser.allow_abbrev = False
    given = parser.parse_args()
    parser.exit_on_error = False  # for as long as the file is read
    try:
        words = _words(parser, given, _read(shipped), short)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"{given.figure}: {error}")
    parser.exit_on_error = True
    return parser.parse_args([*words, *sys.argv[1:]])


def as_words(name: str, values: Sequence[object]) -> list[str]:
    """An option as a command line has it."""
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def positive(text: str) -> int:
    """An option's type: a count or a size."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be an integer, at least 1")
    return int(text)


def size_bytes(text: str) -> int:
    """An option's type: bytes, as 2mb."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _read(path: Path) -> Mapping[Any, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, Mapping):
        raise ConfigError("it must be a mapping of option to value")
    return content


def _words(
    parser: argparse.ArgumentParser, given: argparse.Namespace, shipped: Mapping[Any, Any], short: Sequence[str]
) -> list[str]:
    """The file's options as a command line has them, those of the short form last where it is asked for."""
    content = dict(_read(given.figure))
    test = content.pop("test", {}) if "test" in given else {}
    if not isinstance(test, Mapping):
        raise ConfigError(f"test is {test!r}: it must be a mapping of option to value")
    if missing := [key for key in shipped if key not in content and key != "test"]:
        raise ConfigError(f"{missing[0]!r} is missing; a file has {', '.join(shipped)}")
    known = [key for key, value in vars(given).items() if not isinstance(value, bool) and key not in _NOT_MEASURED]
    words = [*_checked(parser, known, content)]
    shorter = [*_checked(parser, known, test, "test.")]  # read in the long form too: a mistake in it is told at once
    return [*words, *short, *shorter] if "test" in given and given.test else words


def _checked(
    parser: argparse.ArgumentParser, known: Sequence[str], content: Mapping[Any, Any], section: str = ""
) -> Iterator[str]:
    """Every option of a section, after it has been tried alone, so that an error is about one key."""
    for key, value in content.items():
        if key not in known:
            hint = nearest(str(key), known)
            raise ConfigError(f"'{section}{key}' is unknown; the nearest of {', '.join(known)} is {hint!r}")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in values):
            raise ConfigError(f"{section}{key} is {value!r}: it must be text, a number, or a list of them")
        words = as_words(key, values)
        try:
            found, _ = parser.parse_known_args(words)
        except argparse.ArgumentError as error:
            raise ConfigError(f"{section}{key} is {value!r}: {error}") from None
        if isinstance(value, list) and not isinstance(getattr(found, key), list):
            raise ConfigError(f"{section}{key} is {value!r}: it must be one value")
        yield from words
