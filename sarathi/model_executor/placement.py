"""Where a model's numbers live and of which type; knows no model."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """One device and one dtype for weights, activations and cache."""

    dtype: torch.dtype
    device: torch.device
