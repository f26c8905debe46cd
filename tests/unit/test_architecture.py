"""docs/architecture.md names every package, and what the documentation names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "GLOSSARY.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    local = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(local) > 20
    assert not [f"{page.name}: {link}" for page, link in local if not (page.parent / link).exists()]


def test_every_path_that_the_documentation_names_exists() -> None:
    """The README also names files of the original release."""
    top = "csrc|docs|examples|experiments|sarathi|scripts|tests|vattention"
    paths = [(page, path) for page in PAGES[1:] for path in re.findall(rf"`((?:{top})/[\w./-]+)`", page.read_text())]
    assert len(paths) > 50
    assert not [f"{page.name}: {path}" for page, path in paths if not (ROOT / path).exists()]
