"""Device and dtype of a model's weights and activations."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Placement:
    """One device and one dtype for weights, activations and cache."""

    dtype: torch.dtype
    device: torch.device

    @property
    def dtype_name(self) -> str:
        """As "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def dtype_eps(self) -> float:
        """The step from 1 to the next number."""
        return torch.finfo(self.dtype).eps

    def empty(self, *shape: int) -> Tensor:
        """A tensor for weights, with undefined contents."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
