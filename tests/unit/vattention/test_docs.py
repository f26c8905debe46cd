"""docs/allocator.md: its Python runs from top to bottom, and so do the examples of the allocator."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_code_of_the_docs_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/allocator.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 10
    program = tmp_path / "docs.py"
    program.write_text("import sys; sys.path.insert(0, '.')\n" + "\n".join(blocks))
    assert "bytes in use" in run(program)


@pytest.mark.parametrize(
    "example, said",
    [
        ("allocator_decode", "same tokens"), ("allocator_share", "shared"), ("allocator_classic", "rows free"),
        ("allocator_transformers", "same tokens"), ("allocator_dlpack", "300 tokens written and read"),
    ],
)  # fmt: skip
def test_the_examples_run(example: str, said: str) -> None:
    assert said in run(f"examples/{example}.py")
