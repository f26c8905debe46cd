"""Torch twins of the fused matrix products. Knows nothing of layers or models."""

from torch import Tensor
from torch.nn import functional

from sarathi.model_executor.ops.native.activation import silu_and_mul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``. x: [num_tokens, in]; weight: [out, in]; bias: [out].

    Returns [num_tokens, out]: `out` where it is given, contiguous.
    """
    product: Tensor = functional.linear(x, weight, bias, out=out)  # type: ignore[call-arg]  # stubs lack it
    return product


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """``residual += x @ weight.T`` in place. residual: [num_tokens, out]."""
    residual.add_(functional.linear(x, weight))


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``silu_and_mul(linear(x, weight))``. weight: [2 * out, in], gate rows first. Returns [num_tokens, out]."""
    return silu_and_mul(functional.linear(x, weight))
