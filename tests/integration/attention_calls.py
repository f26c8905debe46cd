"""A call of an attention backend on queries and keys that are rotated already."""

from torch import Tensor

from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata


def store_and_attend(
    backend: AttentionBackend, query: Tensor, key: Tensor, value: Tensor, layer: CacheLayer, metadata: Metadata
) -> Tensor:
    """query: [T, num_heads, head_size]; key, value: [T, num_kv_heads, head_size] -> query's shape."""
    backend.store(key, value, layer, metadata)
    return backend.attend(query, layer, metadata)
