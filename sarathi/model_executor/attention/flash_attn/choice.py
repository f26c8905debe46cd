"""Finds the FlashAttention package that does what a model and a memory need, or says what to install."""

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
from sarathi.model_executor.attention.flash_attn.provider import Abilities, Provider


class Candidate(NamedTuple):
    """A package that may be installed."""

    version: str  # fa2, fa3, fa4
    package: str
    install: str  # what to do where it is missing
    abilities: Abilities
    load: Callable[[], Provider]  # ImportError where it is missing


class Need(NamedTuple):
    """What must be computed, and where."""

    dtype: torch.dtype
    head_size: int
    windowed: bool
    block_size: int | None  # tokens of a block; None: contiguous slots
    capability: int  # major compute capability of the device


def candidates() -> list[Candidate]:
    """All packages that we can call, the best first."""
    fa3 = [
        Candidate("fa3", name, package.install, package.abilities, partial(FlashAttention3, name))
        for name, package in PACKAGES.items()
    ]
    fa2 = Candidate("fa2", "flash-attn", "pip install flash-attn", FlashAttention2.abilities, FlashAttention2)
    fa4 = Candidate("fa4", "flash-attn-4", "pip install flash-attn-4", FlashAttention4.abilities, FlashAttention4)
    return [*fa3, fa2, fa4]


def need_of(spec: BackendSpec, arch: ModelArchitecture, dtype: torch.dtype, capability: int) -> Need:
    """What `spec` needs for this model."""
    block_size = (spec.block_size or 16) if spec.is_paged else None
    return Need(dtype, arch.head_size, arch.sliding_window is not None, block_size, capability)


def choose(spec: BackendSpec, need: Need, known: Iterable[Candidate]) -> Provider:
    """The first installed candidate of spec's version (`fa`: any) that can do it.

    Raises KernelUnavailableError that lists each candidate with what it lacks: nothing is put in its place silently.
    """
    refused = []
    for candidate in known:
        if spec.kernel not in ("fa", candidate.version):
            continue
        lacking = lacks(candidate.abilities, need)
        if lacking:
            refused.append(f"{candidate.package} has no {', no '.join(lacking)}")
            continue
        try:
            return candidate.load()
        except ImportError as error:
            refused.append(f"{candidate.package} would do, but {error} ({candidate.install})")
    raise KernelUnavailableError(f"attention backend '{spec}': no FlashAttention can serve it: {'; '.join(refused)}")


def lacks(abilities: Abilities, need: Need) -> list[str]:
    """What a build is missing for this need; empty: it will do."""
    multiple = abilities.block_multiple
    fits = need.block_size is None or multiple is None or need.block_size % multiple == 0
    checks = [
        (need.dtype in abilities.dtypes, f"{str(need.dtype).removeprefix('torch.')} kernels"),
        (need.head_size <= abilities.max_head_size and need.head_size % 8 == 0, f"head size {need.head_size}"),
        (need.capability in abilities.capabilities, f"kernels for compute capability {need.capability}"),
        (abilities.window or not need.windowed, "sliding window"),
        (multiple is not None or (need.block_size is None and abilities.contiguous), "paged KV cache"),
        (fits, f"blocks of {need.block_size} tokens"),
    ]
    return [name for met, name in checks if not met]
