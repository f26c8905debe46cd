"""docs/architecture.md tells the truth: what it names exists, and it names every package."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = set(re.findall(r"^\| `([^`]+)` \|", ARCHITECTURE, re.MULTILINE))


def packages() -> set[str]:
    inits = [*ROOT.glob("sarathi/**/__init__.py"), *ROOT.glob("vattention/**/__init__.py")]
    return {f"{path.parent.relative_to(ROOT)}/" for path in inits}


def test_every_name_exists() -> None:
    assert len(NAMED) > 20
    assert not [name for name in NAMED if not (ROOT / name).exists()]


def test_every_package_is_named() -> None:
    assert not packages() - NAMED


def test_every_module_of_the_engine_and_the_allocator_is_named() -> None:
    modules = [*ROOT.glob("sarathi/**/*.py"), *ROOT.glob("vattention/**/*.py"), *ROOT.glob("csrc/vattention/*")]
    paths = {str(path.relative_to(ROOT)) for path in modules if not path.name.startswith("__init__")}
    assert not {path for path in paths if path not in NAMED and f"{Path(path).parent}/" not in NAMED}
