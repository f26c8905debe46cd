"""Choice of the installed FlashAttention package that meets the requirements of a model and a memory."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.base import KernelUnavailableError
from sarathi.model_executor.attention.flash_attn.fa2 import FlashAttention2
from sarathi.model_executor.attention.flash_attn.fa3 import PACKAGES, FlashAttention3
from sarathi.model_executor.attention.flash_attn.fa4 import FlashAttention4
from sarathi.model_executor.attention.flash_attn.provider import KernelCapabilities, Provider


class Candidate(NamedTuple):
    """A package that may be installed."""

    version: str  # fa2, fa3, fa4
    package: str
    install: str  # how to install it
    capabilities: KernelCapabilities
    load: Callable[[], Provider]  # raises ImportError if it is missing


class Requirements(NamedTuple):
    """What a model, a memory and a device require of a kernel."""

    dtype: torch.dtype
    head_size: int
    windowed: bool
    block_size: int | None  # tokens of a block; None: contiguous slots
    compute_capability: int  # major number of the device


def candidates() -> list[Candidate]:
    """All packages that can be called, the preferred first."""
    fa3 = [
        Candidate("fa3", name, package.install, package.capabilities, partial(FlashAttention3, name))
        for name, package in PACKAGES.items()
    ]
    fa2 = Candidate("fa2", "flash-attn", "pip install flash-attn", FlashAttention2.capabilities, FlashAttention2)
    fa4 = Candidate("fa4", "flash-attn-4", "pip install flash-attn-4", FlashAttention4.capabilities, FlashAttention4)
    return [*fa3, fa2, fa4]


def requirements_of(
    spec: BackendSpec, arch: ModelArchitecture, dtype: torch.dtype, compute_capability: int
) -> Requirements:
    """The requirements of this model on the memory of `spec`."""
    block_size = (spec.block_size or 16) if spec.is_paged else None
    return Requirements(dtype, arch.head_size, arch.sliding_window is not None, block_size, compute_capability)


def choose(spec: BackendSpec, required: Requirements, known: Iterable[Candidate]) -> Provider:
    """The first installed candidate of spec's version (`fa`: any) that meets the requirements.

    Raises KernelUnavailableError that lists what each candidate lacks; no other kernel is substituted.
    """
    refused = []
    for candidate in known:
        if spec.kernel not in ("fa", candidate.version):
            continue
        absent = missing(candidate.capabilities, required)
        if absent:
            refused.append(f"{candidate.package} has no {', no '.join(absent)}")
            continue
        try:
            return candidate.load()
        except ImportError as error:
            refused.append(f"{candidate.package} would serve, but {error} ({candidate.install})")
    raise KernelUnavailableError(f"attention backend '{spec}': no FlashAttention can serve it: {'; '.join(refused)}")


def missing(capabilities: KernelCapabilities, required: Requirements) -> list[str]:
    """The requirements that a build does not meet, for error messages."""
    multiple, head_size = capabilities.block_multiple, required.head_size
    fits = required.block_size is None or multiple is None or required.block_size % multiple == 0
    device = required.compute_capability
    checks = [
        (required.dtype in capabilities.dtypes, f"{str(required.dtype).removeprefix('torch.')} kernels"),
        (head_size <= capabilities.max_head_size and head_size % 8 == 0, f"head size {head_size}"),
        (device in capabilities.compute_capabilities, f"kernels for compute capability {device}"),
        (capabilities.window or not required.windowed, "sliding window"),
        (multiple is not None or (required.block_size is None and capabilities.contiguous), "paged KV cache"),
        (fits, f"blocks of {required.block_size} tokens"),
    ]
    return [name for met, name in checks if not met]
