"""Shapes of the measured models, and random tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Model(NamedTuple):
    """Dimensions of a decoder."""

    name: str
    num_heads: int
    num_kv_heads: int
    hidden: int
    intermediate: int
    vocab: int
    layers: int = 32
    head_size: int = 128

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each matrix of a layer, and of the head."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        return {
            "qkv": (qkv, self.hidden),
            "o": (self.hidden, self.num_heads * self.head_size),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (self.vocab, self.hidden),
        }

    def kv_bytes(self, batch: int, context: int) -> int:
        """Bytes of K and V of one layer in bf16."""
        return batch * context * self.num_kv_heads * self.head_size * 2 * 2


class Pages(NamedTuple):
    """Block sizes, in tokens, of the paged kernels."""

    fa3: tuple[int, ...]
    flashinfer: tuple[int, ...]  # none: its kernels are not measured


LLAMA = Model("llama-3-8b", 32, 8, 4096, 14336, 128256)
YI = Model("yi-6b-200k", 32, 4, 4096, 11008, 64000)
TINY = Model("tiny", 4, 2, 256, 512, 1000, layers=2, head_size=64)  # for trying a script
MODELS = {model.name: model for model in (LLAMA, YI, TINY)}


def random_tensor(*shape: int) -> Tensor:
    """bf16, on the GPU."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")
