"""docs/allocator.md: its Python runs from top to bottom, and so do the examples of the allocator, in this process."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(program)])
    runpy.run_path(str(program), run_name="__main__")


def test_the_code_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/allocator.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 10
    program = tmp_path / "docs.py"
    program.write_text("\n".join(blocks))
    run(program, monkeypatch)
    assert "bytes in use" in capsys.readouterr().out


@pytest.mark.parametrize(
    "example, said",
    [
        ("allocator_decode", "same tokens"), ("allocator_share", "shared"), ("allocator_classic", "rows free"),
        ("allocator_transformers", "same tokens"), ("allocator_dlpack", "300 tokens written and read"),
    ],
)  # fmt: skip
def test_the_examples_run(example: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run(ROOT / "examples" / f"{example}.py", monkeypatch)
    assert said in capsys.readouterr().out
