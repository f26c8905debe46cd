"""Torch twins of the fused normalization kernels. Plain and slow; knows nothing of layers or models."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalization over the last dimension (Zhang and Sennrich, 2019).

    x: [..., size]; weight: [size]. The mean is taken in float32 and the quotient rounded to x's dtype before
    the weight is applied, as the reference implementations of Llama do. Returns a contiguous tensor like x.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place, then ``rms_norm(residual)``. x, residual: [num_tokens, size]."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)
