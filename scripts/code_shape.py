"""Compare the code of checkouts: sizes, functions, import cycles, and the code executed for a first token.

    python scripts/code_shape.py [REVISION_OR_FOLDER ...] [--no-trace]        # default: 9cc8330 and this folder

Revisions are read from git, and their native extension is built for the trace; a folder must have it built. The trace
covers one LLM.generate call for one token: SmolLM2-135M with sdpa_vattn on the CPU. networkx is a dependency of torch.
"""

import argparse
import ast
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import networkx

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("sarathi/benchmark/", "scripts/")
TRACE = """
import json, os, sys, threading
from sarathi import LLM, SamplingParams
root, seen = os.getcwd(), set()

def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith((root + "/sarathi/", root + "/vattention/")):
        if not code.co_name.startswith("<"):  # no comprehensions, lambdas and modules
            seen.add((os.path.relpath(code.co_filename, root), code.co_firstlineno, code.co_name))

with LLM("smollm2-135m", attention_backend="sdpa_vattn", max_model_len=256, max_num_seqs=4) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    threading.setprofile(note)
    sys.setprofile(note)
    llm.generate("The capital of France is", params, use_tqdm=False)
    sys.setprofile(None)
json.dump(sorted(seen), sys.stdout)
"""


class Module(NamedTuple):
    """One Python file. name: dotted; imports: dotted names that it imports when it is imported itself."""

    path: str
    name: str
    lines: int
    functions: list[tuple[int, int]]  # lines and parameters of each
    imports: set[str]


def read_module(root: Path, path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree, relative = ast.parse(text), path.relative_to(root)
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [
        (node.end_lineno - node.lineno + 1, parameters(node)) for node in ast.walk(tree) if isinstance(node, kinds)
    ]
    return Module(str(relative), name, text.count("\n"), functions, set(imported(tree.body)))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters without self and cls."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


def imported(body: list[ast.stmt]) -> Iterator[str]:
    """Names imported when the module is imported: not in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.If | ast.Try | ast.With) and "TYPE_CHECKING" not in ast.dump(
            getattr(node, "test", node)
        ):
            yield from imported([*node.body, *getattr(node, "orelse", [])])
        elif isinstance(node, ast.ClassDef):
            yield from imported(node.body)


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(edges))
    return sorted(sorted(group) for group in groups if len(group) > 1)


def import_edges(modules: list[Module]) -> dict[str, set[str]]:
    """Module -> modules of this repository that it imports."""
    names = {module.name for module in modules}
    edges: dict[str, set[str]] = {}
    for module in modules:
        imports = (name for name in module.imports if not name.endswith("._native"))  # the extension, no module of ours
        nearest = {name if name in names else name.rpartition(".")[0] for name in imports}
        edges[module.name] = (nearest & names) - {module.name}
    return edges


def package_cycles(modules: list[Module]) -> list[list[str]]:
    """Import cycles between folders. A module at the root of the package, as sarathi.request, is its own node."""
    folders = {m.name: m.name if m.path.endswith("__init__.py") else m.name.rpartition(".")[0] for m in modules}
    package = {name: folder if "." in folder else name for name, folder in folders.items()}
    edges: dict[str, set[str]] = {name: set() for name in package.values()}
    for module, targets in import_edges(modules).items():
        edges[package[module]] |= {package[target] for target in targets} - {package[module]}
    return cycles(edges)


def shape(modules: list[Module]) -> dict[str, str]:
    """Statistics of a group of modules, as text."""
    functions = [function for module in modules for function in module.functions]
    lengths, counts = ([each[index] for each in functions] for index in (0, 1))
    return {
        "files": str(len(modules)),
        "lines": f"{sum(module.lines for module in modules):,}",
        "longest file": str(max(module.lines for module in modules)),
        "functions": str(len(functions)),
        "function lines, median / p95": spread(lengths),
        "parameters, median / p95": spread(counts),
        "import cycles of modules": listed(cycles(import_edges(modules))),
        "import cycles of packages": listed(package_cycles(modules)),
    }


def spread(values: list[int]) -> str:
    ordered = sorted(values) or [0]
    return f"{statistics.median(ordered):g} / {ordered[int(0.95 * (len(ordered) - 1))]}"


def listed(groups: list[list[str]]) -> str:
    """The count, then one group per line."""
    return "\n    ".join([str(len(groups)), *(" <-> ".join(group) for group in groups)])


def figures(root: Path, *, trace: bool) -> dict[str, str]:
    """All statistics of a checkout by name."""
    paths = [path for folder in ("sarathi", "vattention", "scripts") for path in sorted((root / folder).rglob("*.py"))]
    modules = [read_module(root, path) for path in paths]
    groups: dict[str, list[Module]] = {"engine": [], "allocator": [], "benchmark and scripts": []}
    for module in modules:
        own = "allocator" if module.path.startswith("vattention/") else "engine"
        groups["benchmark and scripts" if module.path.startswith(EXPERIMENTS) else own].append(module)
    found = {f"{name}: {key}": value for name, group in groups.items() for key, value in shape(group).items()}
    return found | (first_token(root) if trace else {})


def first_token(root: Path) -> dict[str, str]:
    """Number of files and functions executed for a first token; prints the functions per file to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(root), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", TRACE], cwd=root, env=environment, stdout=subprocess.PIPE, check=True)
    functions = json.loads(done.stdout.splitlines()[-1])
    files = Counter(path for path, *_ in functions)
    print(f"# {root}: " + ", ".join(f"{path} {count}" for path, count in files.items()), file=sys.stderr)
    names = {name for *_, name in functions}
    counts = {"files": len(files), "functions": len(functions), "functions by name alone": len(names)}
    return {f"first token: {key}": str(count) for key, count in counts.items()}


def checkout(name: str, scratch: Path, *, build: bool) -> Path:
    """The folder of this name, or a new one with the files of this revision and, where `build`, its extension."""
    if Path(name).is_dir():
        return Path(name).resolve()
    done = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"code_shape.py: {name!r} is neither a folder nor a revision: {done.stderr.decode().strip()}")
    folder = scratch / name.replace("/", "-")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder)
    if build:
        subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", metavar="REVISION_OR_FOLDER", default=["9cc8330", str(ROOT)])
    parser.add_argument("--no-trace", action="store_true", help="without the first token; builds no extension")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [checkout(name, Path(scratch), build=not options.no_trace) for name in options.checkouts]
        columns = [figures(folder, trace=not options.no_trace) for folder in folders]
    width = max(map(len, columns[0]))
    print(" " * width, *(f"{name:>24}" for name in options.checkouts))
    for key in columns[0]:
        cells = [column[key].partition("\n") for column in columns]
        print(f"{key:{width}}", *(f"{cell:>24}" for cell, _, _ in cells))
        for name, (_, _, more) in zip(options.checkouts, cells, strict=True):
            print(*(f"    {name}: {line.strip()}\n" for line in more.splitlines()), end="", sep="")


if __name__ == "__main__":
    main()
