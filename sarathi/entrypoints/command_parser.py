"""Argument parser with a short --help with examples, --help-knobs for all options, and one-line errors."""

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from sarathi.config.knobs import ConfigError
from sarathi.config.load import find_knob
from sarathi.config.schema import EngineConfig
from sarathi.config.vllm_names import VLLM_NAMES

_NEAR = 0.75  # minimum similarity of names, 0 to 1
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (?:.* )?--([^\s=]+)")


class Parser(argparse.ArgumentParser):
    """Only --help-knobs shows hidden options. examples: command lines at the end of --help."""

    def __init__(self, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.epilog = "\n  ".join(["examples:", *examples]) if examples else None
        self._knobs: list[argparse.Action] = []

    def hide(self, knobs: Iterable[argparse.Action]) -> None:
        """Hide these options from --help and add --help-knobs."""
        if not self._knobs:
            self.add_argument("--help-knobs", action=_HelpKnobs, help="show every option with its default and exit")
        self._knobs += knobs

    def format_help(self) -> str:
        """The help without hidden options."""
        full = {knob: knob.help for knob in self._knobs}
        for knob in self._knobs:
            knob.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for knob, text in full.items():
                knob.help = text

    def format_full_help(self) -> str:
        """The help with all options."""
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Print one line instead of argparse's usage, which would list all options."""
        self.exit(2, f"{self.prog}: {message} ({self._hint(message)})\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Report unknown options here: the main parser does not know a command's options."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _hint(self, message: str) -> str:
        """A hint for an unknown option: the nearest one, or the equivalent of a vLLM option."""
        found = _UNRECOGNIZED.search(message)
        if not found:
            return "--help lists the options"
        near = get_close_matches(f"--{found[1]}", self._option_string_actions, 1, _NEAR)
        if near and found[1].lower().replace("-", "_") not in VLLM_NAMES:
            return f"the nearest option is {near[0]}"
        try:
            find_knob(EngineConfig, found[1])
        except ConfigError as error:
            return str(error)
        return "--help lists the options"


class _HelpKnobs(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_full_help(), end="")
        parser.exit()
