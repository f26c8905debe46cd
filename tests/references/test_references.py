"""docs/references.md: reference and engine say what stands in its table, and every test that it names is there."""

import re

import llamacpp
import pytest
from comparison import Comparison
from table import COMPARISONS, DOCUMENT, TESTS, row, rows, values_of


@pytest.mark.slow
@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda each: each.compute.__name__)
def test_reference_and_engine_say_what_the_table_says(comparison: Comparison) -> None:
    if comparison.reference.startswith("llama.cpp") and not llamacpp.is_installed():
        pytest.skip("llama.cpp is not installed: pip install xllamacpp")
    values = values_of(comparison)
    assert (values.theirs == values.ours) == (not comparison.why)
    assert row(comparison, values) in rows(DOCUMENT.read_text()), "python tests/references/table.py writes the table"


def test_every_row_has_a_comparison_and_every_test_exists() -> None:
    text = DOCUMENT.read_text()
    assert len(rows(text)) == len(COMPARISONS)
    for comparison, found in zip(COMPARISONS, rows(text), strict=True):
        assert found.startswith(f"| {comparison.what} | {comparison.reference} |")
    named = re.findall(r"`((?:unit|integration|fuzz|references)/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > len(COMPARISONS)
    for path, name in named:
        assert f"def {name}(" in (TESTS / path).read_text(), (path, name)
