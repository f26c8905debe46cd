"""Layers that own a weight and call one operation: Linear, Embedding, RMSNorm."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sarathi.model_executor.ops import Ops
from sarathi.model_executor.placement import Placement


class Linear:
    """y = x W^T + b, for one projection or for several fused by rows: parts={"q_proj": 512, "k_proj": 128, ...}.

    weight  [sum of parts, in_features]      q_proj rows
                                             k_proj rows
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool, place: Placement, ops: Ops) -> None:
        self.parts = dict(parts)
        out_features = sum(parts.values())
        self.weight = torch.empty(out_features, in_features, dtype=place.dtype, device=place.device)
        self.bias = torch.empty(out_features, dtype=place.dtype, device=place.device) if bias else None
        self.ops = ops

    @classmethod
    def tied_to(cls, embedding: "Embedding", name: str, place: Placement, ops: Ops) -> "Linear":
        """The product with an embedding's weight."""
        linear = cls(0, {name: 0}, bias=False, place=place, ops=ops)
        linear.weight = embedding.weight
        return linear

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [T, in_features] -> [T, sum of parts]: `out` where it is given, contiguous."""
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
        """Call once, when the weight is filled: changes it to the layout that the operations are fastest with."""
        self.weight = self.ops.pack(self.weight)


class Embedding:
    """A vector of `weight`, [vocab_size, hidden_size], for each token."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement, ops: Ops) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=place.dtype, device=place.device)
        self.ops = ops

    def __call__(self, token_ids: Tensor, last_tokens: Tensor | None = None) -> Tensor:
        """token_ids: [T] integers, where last_tokens [slots] is given placeholder tokens too -> [T, hidden_size]."""
        return self.ops.embed(token_ids, self.weight, last_tokens)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, place: Placement, ops: Ops) -> None:
        self.weight = torch.empty(size, dtype=place.dtype, device=place.device)
        self._eps, self.ops = eps, ops

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., size] -> the same shape, contiguous."""
        return self.ops.rms_norm(x, self.weight, self._eps)
