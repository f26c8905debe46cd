"""The gated activation of the feed-forward layer; knows no weights."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2 * N], gate before up -> silu(gate) * up, [T, N]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
