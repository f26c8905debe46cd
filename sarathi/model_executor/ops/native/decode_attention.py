"""Torch twin of the split-KV decode kernel. Knows nothing of schedulers or of who owns the cache."""

import torch
from torch import Tensor

from sarathi.model_executor.ops.native.rope import rope_and_store
from sarathi.model_executor.ops.types import CacheTarget, DecodeBatch, NewTokens


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float, new: NewTokens | None = None
) -> Tensor:
    """Attention of one query token a sequence over its slot of a contiguous cache, in float32.

    q: [num_seqs, heads, head_size]; keys, values: [num_slots, slot_tokens, kv_heads, head_size].
    Returns q's shape and dtype; rows of length 0 (padding) are zero. Nothing past a length is read.
    new: turned and stored first, and q turned with it; None where both is done.
    """
    if new is not None:
        q = _append(q, keys, values, batch, new)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for index, (slot, length) in enumerate(zip(batch.slots.tolist(), batch.lengths.tolist(), strict=True)):
        first = 0 if batch.window is None else max(0, length - batch.window)
        if length:
            out[index] = _attend(q[index], keys[slot, first:length], values[slot, first:length], scale).to(q.dtype)
    return out


def _append(q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, new: NewTokens) -> Tensor:
    """Stores the new tokens; the queries, turned. Padding is stored nowhere."""
    q, positions = q.clone(), (batch.lengths - 1).clamp(min=0)
    target = CacheTarget(keys, values, torch.where(batch.lengths > 0, batch.slots, -1), positions)
    rope_and_store(q, new.keys.clone(), new.values, positions, new.table, target)
    return q


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    groups = q.float().view(keys.shape[1], -1, q.shape[-1])  # [kv_heads, heads / kv_heads, head_size]
    scores = torch.einsum("hgd,thd->hgt", groups, keys.float()) * scale
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), values.float()).reshape(q.shape)
