"""The table of docs/references.md, from what the reference and the engine say now.

python tests/references/table.py       run every comparison and write the table
"""

import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("integration", "unit/worker", "unit/engine"))

import folders
import generation
import gguf_rules
from comparison import COMPARISONS, Comparison, Values

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs/references.md"
BEGIN, END = "<!-- comparisons -->", "<!-- end of comparisons -->"
MODULES = (folders, generation, gguf_rules)  # whose import registers their comparisons


def values_of(comparison: Comparison) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        return comparison.compute(Path(folder))


def row(comparison: Comparison, values: Values) -> str:
    theirs, ours = (f"`{value}`".replace("|", "\\|").replace("\n", "\\n") for value in values)
    cells = (comparison.what, comparison.reference, theirs, "the same" if theirs == ours else ours, comparison.why)
    return f"| {' | '.join(cells)} | `{comparison.test}` |"


def rows(document: str) -> list[str]:
    """Those between the marks, without the head."""
    return document.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[4:]


def table() -> Iterator[str]:
    yield f"transformers {version('transformers')}, llama.cpp as in xllamacpp {version('xllamacpp')}."
    yield ""
    yield "| input | reference | its value | ours | why another | test |\n|---|---|---|---|---|---|"
    for comparison in COMPARISONS:
        yield row(comparison, values_of(comparison))


def main() -> None:
    text = DOCUMENT.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DOCUMENT.write_text("\n".join([before + BEGIN, *table(), END + after]))


if __name__ == "__main__":
    main()
