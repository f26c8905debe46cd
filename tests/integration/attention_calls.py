"""A call of an attention backend on queries and keys that are rotated already."""

import torch
from torch import Tensor

from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.ops.types import NewTokens, RopeTable


def store_and_attend(
    backend: AttentionBackend, query: Tensor, key: Tensor, value: Tensor, layer: CacheLayer, metadata: Metadata
) -> Tensor:
    """query: [T, num_heads, head_size]; key, value: [T, num_kv_heads, head_size] -> query's shape."""
    store(backend, key, value, layer, metadata)
    return backend.attend(query, layer, metadata)


def store(backend: AttentionBackend, key: Tensor, value: Tensor, layer: CacheLayer, metadata: Metadata) -> None:
    """Through RoPE by angles of 0, which changes no bit."""
    half = key.shape[-1] // 2
    still = RopeTable(key.new_ones(1, half), key.new_zeros(1, half))
    positions = torch.zeros(len(key), dtype=torch.int32, device=key.device)
    backend.rope_and_store(key.clone(), NewTokens(key, value, still), positions, layer, metadata)
