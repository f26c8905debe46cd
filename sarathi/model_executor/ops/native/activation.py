"""Torch twin of the fused gated activation. Knows nothing of layers or models."""

from torch import Tensor
from torch.nn.functional import silu


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``. gate_up: [num_tokens, 2 * size], gate first. Returns [num_tokens, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
