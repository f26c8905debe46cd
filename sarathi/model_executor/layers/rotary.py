"""Rotary position embedding (Su et al., 2021) in the half-split layout."""

from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.placement import Placement
from sarathi.model_executor.rope import Rope, RopeFrequencies


class RopeTable(NamedTuple):
    """One step's factors: cos [T, 1, D] and sin [T, 1, D], the first half of sin negated."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding:
    """Turns each pair (x[i], x[i + D/2]) by position times frequency i."""

    def __init__(self, rope: Rope, head_size: int, place: Placement) -> None:
        self.dtype = place.dtype
        self.frequencies = RopeFrequencies(rope, head_size, place.device)

    def table(self, positions: Tensor, lengths: Tensor | None = None) -> RopeTable:
        """positions, lengths: [T] integers, see RopeFrequencies -> factors that all layers of the step share."""
        cos, sin = (part.to(self.dtype) for part in self.frequencies.cos_sin(positions, lengths))
        return RopeTable(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """x: [T, H, D], heads of query and key alike -> turned by their tokens' positions."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * table.cos, swapped, table.sin)
