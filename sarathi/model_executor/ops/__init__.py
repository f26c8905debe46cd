"""The operations that a decoder step is made of: Triton on CUDA, torch elsewhere, of one interface.

Knows nothing of layers, models or schedulers. Triton is imported only where a CUDA device is asked for.
"""

from typing import Protocol

import torch
from torch import Tensor

from sarathi.model_executor.ops.types import CacheTarget, RotationTable


class Ops(Protocol):
    """Shapes and meaning: see the functions of these names in ``ops.native``."""

    def embed(self, token_ids: Tensor, newest: Tensor, weight: Tensor) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: RotationTable, target: CacheTarget
    ) -> None: ...
    def store(self, k: Tensor, v: Tensor, target: CacheTarget) -> None: ...
    def silu_and_mul(self, gate_up: Tensor) -> Tensor: ...
    def argmax(self, logits: Tensor) -> Tensor: ...
    def argmax_into(self, logits: Tensor, homes: Tensor, newest: Tensor) -> Tensor: ...
    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor: ...
    def top_p_threshold(self, logits: Tensor, top_p: Tensor) -> Tensor: ...
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor: ...
    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor) -> None: ...
    def gated_linear(self, x: Tensor, weight: Tensor) -> Tensor: ...


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def create_ops(device: torch.device) -> Ops:
    """The fastest kernels for `device`, for one stream."""
    if device.type == "cuda":
        from sarathi.model_executor.ops.triton.ops import TritonOps

        return TritonOps(device, pdl=overlaps_launches(device))
    from sarathi.model_executor.ops.native.ops import NativeOps

    return NativeOps()
