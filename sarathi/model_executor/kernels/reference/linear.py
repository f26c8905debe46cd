"""Torch twins of the fused matrix products. Knows nothing of layers or models."""

from torch import Tensor
from torch.nn import functional

from sarathi.model_executor.kernels.reference.activation import silu_and_mul
from sarathi.model_executor.kernels.reference.norm import rms_norm


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``. x: [num_tokens, in]; weight: [out, in]; bias: [out]. Returns [num_tokens, out]."""
    return functional.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """``residual += x @ weight.T`` in place. residual: [num_tokens, out]."""
    residual.add_(functional.linear(x, weight))


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(rms_norm(x, norm_weight, eps), weight, bias)``."""
    return functional.linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """``silu_and_mul(norm_linear(x, ...))``. weight: [2 * out, in], gate rows first. Returns [num_tokens, out]."""
    return silu_and_mul(norm_linear(x, norm_weight, eps, weight))
