"""KV cache that is contiguous in virtual memory and mapped to physical pages on demand. Knows nothing of serving."""

from vattention.errors import DeviceError, IntegrityError, NoFreeSlotError, OutOfMemoryError, VAttentionError
from vattention.kv_cache import VirtualKVCache
from vattention.stats import CacheStats

__all__ = [
    "CacheStats",
    "DeviceError",
    "IntegrityError",
    "NoFreeSlotError",
    "OutOfMemoryError",
    "VAttentionError",
    "VirtualKVCache",
]
