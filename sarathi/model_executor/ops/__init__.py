"""The operations of a decoder step, in two sets with one interface: Triton kernels on CUDA, torch elsewhere.

Triton is imported only where a CUDA device is asked for.
"""

from typing import Protocol

import torch
from torch import Tensor

from sarathi.model_executor.ops.types import CacheTarget, RopeTable


class Ops(Protocol):
    """Shapes and meaning: see the methods of ``ops.native.NativeOps``."""

    def embed(self, token_ids: Tensor, weight: Tensor, last_tokens: Tensor | None = None) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: RopeTable, target: CacheTarget
    ) -> None: ...
    def pack(self, weight: Tensor) -> Tensor: ...
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor: ...
    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> None: ...
    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def silu_and_mul(self, gate_up: Tensor) -> Tensor: ...
    def argmax(self, logits: Tensor) -> Tensor: ...
    def argmax_into(self, logits: Tensor, slots: Tensor, last_tokens: Tensor) -> Tensor: ...
    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None: ...
    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor: ...
    def top_p_threshold(self, logits: Tensor, top_p: Tensor) -> Tensor: ...


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def create_ops(device: torch.device) -> Ops:
    """The fastest operations for `device`, for one stream."""
    if device.type == "cuda":
        from sarathi.model_executor.ops.triton.ops import TritonOps

        return TritonOps(device, pdl=overlaps_launches(device))
    from sarathi.model_executor.ops.native import NativeOps

    return NativeOps()
