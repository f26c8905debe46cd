"""Figures of a small tree whose answers are known."""

import ast
from pathlib import Path

import code_shape
import pytest

FILES = {
    "sarathi/__init__.py": "",
    "sarathi/a.py": "from sarathi.b import one\n\n\ndef two(self, x, *, y=1, **rest):\n    return one\n",
    "sarathi/b.py": "from sarathi.inner import c\n\none = c\n",
    "sarathi/inner/__init__.py": "",
    "sarathi/inner/c.py": "import sarathi.a\n\n\ndef late():\n    import sarathi.inner.d\n",
    "sarathi/inner/d.py": "from sarathi.inner.c import late\n",
    "sarathi/benchmark/e.py": "x = 1\n",
    "vattention/__init__.py": "y = 1\n",
    "scripts/f.py": "z = 1\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_sizes_and_cycles(tree: Path) -> None:
    found = code_shape.figures(tree, trace=False)
    assert found["engine: files"] == "6" and found["benchmark and scripts: lines"] == "2"
    assert found["engine: function lines, median / p95"] == "2 / 2"
    cycle = "1\n    sarathi.a <-> sarathi.b <-> sarathi.inner.c"  # an import in a function makes none
    assert found["engine: import cycles of modules"] == cycle
    assert found["engine: import cycles of packages"] == "1\n    sarathi.a <-> sarathi.b <-> sarathi.inner"
    assert found["allocator: import cycles of modules"] == "0"


def test_parameters_are_counted_without_self() -> None:
    function = ast.parse(FILES["sarathi/a.py"]).body[1]
    assert isinstance(function, ast.FunctionDef) and code_shape.parameters(function) == 3


def test_an_unknown_revision_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'no-such-revision' is neither a folder nor a revision"):
        code_shape.checkout("no-such-revision", tmp_path, build=True)
