"""Rotary position embedding (Su et al., 2021) in the half-split layout, and its scalings; knows positions only."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.architecture import Rope
from sarathi.model_executor.placement import Placement


class RopeTable(NamedTuple):
    """One step's factors: cos [T, 1, D] and sin [T, 1, D], the first half of sin negated."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding:
    """Turns each pair (x[i], x[i + D/2]) by position times frequency i."""

    def __init__(self, rope: Rope, head_size: int, place: Placement) -> None:
        self.dtype = place.dtype
        self.frequencies = frequencies(rope, head_size).to(place.device)  # [D/2] float32

    def table(self, positions: Tensor) -> RopeTable:
        """positions: [T] integers -> factors that all layers of the step share."""
        angles = torch.outer(positions.float(), self.frequencies)  # [T, D/2]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return RopeTable(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """x: [T, H, D], heads of query and key alike -> turned by their tokens' positions."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * table.cos, swapped, table.sin)


def frequencies(rope: Rope, head_size: int) -> Tensor:
    """Radians a position, [head_size / 2] float32."""
    base = 1.0 / (rope.theta ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size))
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _blend_llama3(base, rope)
    if rope.kind == "divided":
        return base / torch.tensor(rope.divisors, dtype=torch.float32)
    return base


def _blend_llama3(base: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: slow frequencies are divided, fast ones kept, the band between them is interpolated."""
    turns = rope.original_max_positions * base / (2 * math.pi)  # turns over the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * base / rope.factor + kept * base
