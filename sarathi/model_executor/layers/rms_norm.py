"""Root-mean-square normalisation (Zhang and Sennrich, 2019), with the residual sum before it; knows no layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sarathi.model_executor.placement import Placement

_CPU_FLOAT32 = Placement(torch.float32, torch.device("cpu"))


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, place: Placement) -> None:
        self.weight = torch.empty(size, dtype=place.dtype, device=place.device)
        self.eps = eps
        self._normalize = _normalize_float32 if place == _CPU_FLOAT32 else _normalize

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., size] -> the same shape."""
        return self._normalize(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x to `residual` in place and returns the sum normalised; both [T, size]."""
        return self(residual.add_(x))


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _normalize_float32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same with one temporary of x's size instead of four: a tenth of the time for a CPU's chunk of 512 tokens."""
    scale = torch.linalg.vecdot(x, x).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    normalized: Tensor = (x * scale.unsqueeze(-1)).mul_(weight)
    return normalized
