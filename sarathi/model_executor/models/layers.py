"""Layers of a decoder: each owns its weights and calls operations; Attention calls a backend too.

Linear, Embedding and RMSNorm have one weight each. GatedMLP and Attention consist of them.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import Metadata
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.ops.types import NewTokens, RopeTable
from sarathi.model_executor.placement import Placement


class Linear:
    """y = x W^T + b, for one projection or for several fused by rows: parts={"q_proj": 512, "k_proj": 128, ...}.

    weight  [sum of parts, in_features]      q_proj rows
                                             k_proj rows
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool, place: Placement, ops: Ops) -> None:
        self.parts = dict(parts)
        out_features = sum(parts.values())
        self.weight = place.empty(out_features, in_features)
        self.bias = place.empty(out_features) if bias else None
        self.ops = ops

    @classmethod
    def tied_to(cls, embedding: "Embedding", name: str, place: Placement, ops: Ops) -> "Linear":
        """The product with an embedding's weight."""
        linear = cls(0, {name: 0}, bias=False, place=place, ops=ops)
        linear.weight = embedding.weight
        return linear

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [T, in_features] -> [T, sum of parts]; `out`, contiguous, if given."""
        return self.ops.linear(x, self.weight, self.bias, out)

    def add_to(self, x: Tensor, residual: Tensor) -> None:
        """residual += self(x), in place. x: [T, in_features]; residual: [T, sum of parts], contiguous."""
        self.ops.linear_add(x, self.weight, residual, self.bias)

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up of two equal parts, gate first. x: [T, in_features] -> [T, sum of parts / 2]."""
        return self.ops.gated_linear(x, self.weight, self.bias)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names as in checkpoints (`prefix` + part + ".weight"), each with its rows of the fused tensor."""
        for tensor, kind in ((self.weight, "weight"), (self.bias, "bias")):
            if tensor is not None:
                for name, rows in zip(self.parts, torch.split(tensor, list(self.parts.values())), strict=True):
                    yield f"{prefix}{name}.{kind}", rows

    def pack(self) -> None:
        """Call once, after the weight is filled: changes it to the fastest layout for the operations."""
        self.weight = self.ops.pack(self.weight)


class Embedding:
    """A vector of `weight`, [vocab_size, hidden_size], for each token."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement, ops: Ops) -> None:
        self.weight = place.empty(vocab_size, hidden_size)
        self.ops = ops

    def __call__(self, token_ids: Tensor, last_tokens: Tensor | None = None) -> Tensor:
        """token_ids: [T] integers, with placeholder tokens if last_tokens [slots] is given -> [T, hidden_size]."""
        return self.ops.embed(token_ids, self.weight, last_tokens)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, place: Placement, ops: Ops) -> None:
        self.weight = place.empty(size)
        self._eps, self.ops = eps, ops

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., size] -> the same shape, contiguous."""
        return self.ops.rms_norm(x, self.weight, self._eps)


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, arch: ModelArchitecture, place: Placement, ops: Ops) -> None:
        inner, hidden, bias = arch.intermediate_size, arch.hidden_size, arch.mlp_bias
        self.gate_up = Linear(hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias, place=place, ops=ops)
        self.down = Linear(inner, {"down_proj": hidden}, bias=bias, place=place, ops=ops)

    def add_to(self, x: Tensor, residual: Tensor) -> None:
        """Add the layer's output to the residual, in place. x, residual: [T, hidden_size]."""
        self.down.add_to(self.gate_up.gated(x), residual)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield from self.gate_up.parameters(prefix)
        yield from self.down.parameters(prefix)

    def pack(self) -> None:
        self.gate_up.pack()
        self.down.pack()


class AttentionStep(NamedTuple):
    """What the attention layers of one step share."""

    rope: RopeTable
    positions: Tensor  # [T] integers: each token's entry of the table
    metadata: Metadata  # of the backend


class AttentionFunction(Protocol):
    """The part of an attention backend that a layer calls."""

    def append_and_attend(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: Metadata
    ) -> Tensor:
        """See AttentionBackend."""


class Attention:
    """Grouped-query attention; with `arch.qk_norm`, query and key heads are normalized (Qwen 3)."""

    def __init__(self, arch: ModelArchitecture, place: Placement, ops: Ops, backend: AttentionFunction) -> None:
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
        query, key, value = heads.split_with_sizes(self._heads, 1)  # torch.split, without its Python
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
