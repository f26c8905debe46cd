"""The attention layer: projections around a backend, which applies RoPE, stores keys and values, and attends."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.layers.basic import Linear, RMSNorm
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.ops.types import NewTokens, RopeTable
from sarathi.model_executor.placement import Placement


class AttentionStep(NamedTuple):
    """What the attention layers of one step share."""

    rope: RopeTable
    positions: Tensor  # [T] integers: each token's entry of the table
    metadata: Metadata  # of the backend


class Attention:
    """Grouped-query attention, where `arch.qk_norm` says so with normalized query and key heads (Qwen 3)."""

    def __init__(self, arch: ModelArchitecture, place: Placement, ops: Ops, backend: AttentionBackend) -> None:
        query, key, value = arch.qkv_sizes
        parts = {"q_proj": query, "k_proj": key, "v_proj": value}
        self.qkv = Linear(arch.hidden_size, parts, bias=arch.qkv_bias, place=place, ops=ops)
        self.output = Linear(query, {"o_proj": arch.hidden_size}, bias=arch.o_bias, place=place, ops=ops)
        self.head_norms = (
            [RMSNorm(arch.head_size, arch.rms_norm_eps, place, ops) for _ in range(2)] if arch.qk_norm else None
        )
        self._heads, self._head_size = [arch.num_heads, arch.num_kv_heads, arch.num_kv_heads], arch.head_size
        self.backend = backend

    def add_to(self, x: Tensor, residual: Tensor, step: AttentionStep, layer: CacheLayer) -> None:
        """Add the layer's output to the residual, in place, and store the tokens' keys and values in the cache layer.

        x, residual: [T, hidden_size].
        """
        heads = self.qkv(x).view(x.shape[0], sum(self._heads), self._head_size)
        query, key, value = torch.split(heads, self._heads, dim=1)
        if self.head_norms is not None:
            query, key = (norm(each) for norm, each in zip(self.head_norms, (query, key), strict=True))
        new = NewTokens(key, value, step.rope)
        attended = self.backend.append_and_attend(query, new, step.positions, layer, step.metadata)
        self.output.add_to(attended.view(x.shape[0], -1), residual)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield from self.qkv.parameters(prefix)
        yield from self.output.parameters(prefix)
        for name, norm in zip(("q_norm", "k_norm"), self.head_norms or (), strict=False):
            yield f"{prefix}{name}.weight", norm.weight

    def pack(self) -> None:
        self.qkv.pack()
        self.output.pack()
