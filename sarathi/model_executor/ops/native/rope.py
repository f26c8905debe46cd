"""Torch twins of the rotary embedding kernels. Knows nothing of layers, schedulers or cache layouts."""

import torch
from torch import Tensor

from sarathi.model_executor.ops.types import CacheTarget, RotationTable


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, table: RotationTable) -> None:
    """Rotates q and k in place (Su et al., 2021), pairing element i with element i + rotary_dim / 2.

    q: [num_tokens, heads, head_size]; k: [num_tokens, kv_heads, head_size], any strides with the last one 1;
    positions: [num_tokens] integers. Elements past rotary_dim stay as they are. Arithmetic is float32.
    """
    cos, sin = table.cos[positions].float(), table.sin[positions].float()
    for x in (q, k):
        _rotate(x, cos[:, None], sin[:, None])


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: RotationTable, target: CacheTarget
) -> None:
    """``apply_rope``, then the rotated keys and the values v: [num_tokens, kv_heads, head_size] go to the cache.

    Tokens whose row is negative are rotated but stored nowhere.
    """
    apply_rope(q, k, positions, table)
    store(k, v, target)


def store(k: Tensor, v: Tensor, target: CacheTarget) -> None:
    """Writes keys and values [num_tokens, kv_heads, head_size] to (row, col) of the cache; negative rows nowhere."""
    kept = target.rows >= 0
    rows, cols = target.rows[kept].long(), target.cols[kept].long()
    target.keys[rows, cols] = k[kept]
    target.values[rows, cols] = v[kept]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[-1]
    left, right = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    x[..., : 2 * half] = rotated.to(x.dtype)
