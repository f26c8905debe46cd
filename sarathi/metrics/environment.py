"""The environment of a measurement: machine, packages, command and revision of the code."""

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "triton", "flashinfer-python", "flash-attn", "fa3-fwd")


def environment() -> dict[str, Any]:
    """The environment of this process, as JSON values. Packages that are not installed are left out."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "device": _device(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": git_revision(),
    }


def caption(runs: Iterable[Mapping[str, Any]], models: Iterable[str] = ()) -> str:
    """The caption of a figure of `runs`: models (default: commands), hardware, torch version and git revisions."""
    found = list(runs)
    subjects = list(models) or [str(run.get("command", "")) for run in found]
    hardware = [str(run.get("device") or run.get("processor", "")) for run in found]
    torch = [f"torch {run['packages']['torch']}" for run in found if "torch" in run.get("packages", {})]
    commits = [str(run["git"]["commit"])[:7] for run in found if "commit" in (run.get("git") or {})]
    parts = [", ".join(dict.fromkeys(part)) for part in (subjects, hardware, torch, commits)]
    return "; ".join(part for part in [*parts[:3], f"revision {parts[3]}" if commits else ""] if part)


def git_revision() -> dict[str, Any] | None:
    """The commit of the running code, and whether tracked files are modified; None outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "modified": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Count and name of the CPUs from /proc/cpuinfo, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _device() -> str | None:
    """Count and name of the GPUs; None without a GPU or if torch is not imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
