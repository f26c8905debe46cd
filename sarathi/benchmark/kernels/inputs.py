"""Random tensors to measure with. Knows no kernel."""

import torch
from torch import Tensor


def random_tensor(*shape: int) -> Tensor:
    """bf16, on the GPU."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")
