"""The command line's parser: a short --help with examples, all options under --help-knobs, errors in one line."""

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from sarathi.config.knobs import ConfigError
from sarathi.config.load import find_knob
from sarathi.config.schema import EngineConfig

_UNRECOGNIZED = re.compile(r"unrecognized arguments: (?:.* )?--([^\s=]+)")


class Parser(argparse.ArgumentParser):
    """Options that are hidden as knobs appear in --help-knobs alone. examples: command lines at the end of --help."""

    def __init__(self, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.epilog = "\n  ".join(["examples:", *examples]) if examples else None
        self._knobs: list[argparse.Action] = []

    def hide(self, knobs: Iterable[argparse.Action]) -> None:
        """Leave these options to --help-knobs, which is added here."""
        if not self._knobs:
            self.add_argument("--help-knobs", action=_HelpKnobs, help="show every option with its default and exit")
        self._knobs += knobs

    def format_help(self) -> str:
        """Without knobs."""
        full = {knob: knob.help for knob in self._knobs}
        for knob in self._knobs:
            knob.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for knob, text in full.items():
                knob.help = text

    def format_full_help(self) -> str:
        """With knobs."""
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """One line: the list of all options would bury it."""
        self.exit(2, f"{self.prog}: {message} ({_hint(message)})\n")


class _HelpKnobs(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_full_help(), end="")
        parser.exit()


def _hint(message: str) -> str:
    """What to write in place of an unknown option, where it is like a knob, or a setting of vLLM."""
    found = _UNRECOGNIZED.search(message)
    try:
        if found:
            find_knob(EngineConfig, found[1])
    except ConfigError as error:
        return str(error)
    return "--help lists the options"
