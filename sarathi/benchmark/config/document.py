"""Generate default.yml and the README's table of knobs from the schema.

python -m sarathi.benchmark.config.document writes both into this package.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.config.knobs import Knob, Section, knobs_of, sections_of

FOLDER = Path(__file__).parent
DEFAULT_FILE = FOLDER / "default.yml"
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- knobs -->", "<!-- end of knobs -->"


def default_yaml() -> str:
    """Every knob with its default, and its help text as a comment."""
    head = "# Every knob of a run, with its default. Copy what you change; the command line wins over the file."
    lines = [head, *_yaml_knobs(BenchmarkConfig, "")]
    for name, section in sections_of(BenchmarkConfig).items():
        lines += ["", f"# {_sentence(section)}", f"{name}:", *_yaml_knobs(section, "  ")]
    return "\n".join(lines) + "\n"


def print_help(words: Sequence[str], text: str) -> bool:
    """Print `text` for --help and default_yaml() for --help-knobs; returns False for neither."""
    if {"-h", "--help"} & set(words):
        print(text, end="")
    elif "--help-knobs" in words:
        print(default_yaml(), end="")
    else:
        return False
    return True


def knob_table() -> str:
    """A Markdown table of every knob."""
    rows = [
        f"| `{each.path}` | `{_shown(each)}` | {each.help} | {each.allowed} |" for each in knobs_of(BenchmarkConfig)
    ]
    return "\n".join(["| knob | default | what it is | takes |", "|---|---|---|---|", *rows])


def readme_with_table(text: str) -> str:
    """`text` with the current table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{knob_table()}\n{END}{after}"


def _yaml_knobs(section: type[Section], indent: str) -> Iterator[str]:
    for each in knobs_of(section):
        if "." in each.path:
            continue
        comment = f"{each.help} ({each.allowed})"
        yield from (f"{indent}# {line}" for line in textwrap.wrap(comment, 116 - len(indent)))
        yield f"{indent}{each.path}: {json.dumps(each.default)}"


def _sentence(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _shown(each: Knob) -> str:
    return "none" if each.default is None else str(each.default) or "(empty)"


def main() -> None:
    DEFAULT_FILE.write_text(default_yaml(), encoding="utf-8")
    README.write_text(readme_with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
