"""KV cache that is contiguous in virtual memory and mapped to physical pages on demand. Knows nothing of serving."""

from vattention import _interpreter  # noqa: F401  # first: it refuses interpreters in which the others hang
from vattention.classic import ClassicAPI
from vattention.errors import (
    DeviceError,
    ForkError,
    IntegrityError,
    NoFreeSlotError,
    OutOfMemoryError,
    VAttentionError,
)
from vattention.kv_cache import VirtualKVCache
from vattention.stats import CacheStats

# The functions of the original release, all on one cache of their own.
_classic = ClassicAPI()
init_kvcache = _classic.init_kvcache
reserve_physical_pages = _classic.reserve_physical_pages
alloc_new_batch_idx = _classic.alloc_new_batch_idx
free_batch_idx = _classic.free_batch_idx
step = _classic.step
step_async = _classic.step_async
num_free_kvblocks = _classic.num_free_kvblocks
set_deferred_reclamation = _classic.set_deferred_reclamation
map_common_pages = _classic.map_common_pages
show_kvcache_config = _classic.show_kvcache_config
show_allocator_state = _classic.show_allocator_state
set_verbose = _classic.set_verbose
cleanup = _classic.cleanup

__all__ = [
    "CacheStats",
    "DeviceError",
    "ForkError",
    "IntegrityError",
    "NoFreeSlotError",
    "OutOfMemoryError",
    "VAttentionError",
    "VirtualKVCache",
    "alloc_new_batch_idx",
    "cleanup",
    "free_batch_idx",
    "init_kvcache",
    "map_common_pages",
    "num_free_kvblocks",
    "reserve_physical_pages",
    "set_deferred_reclamation",
    "set_verbose",
    "show_allocator_state",
    "show_kvcache_config",
    "step",
    "step_async",
]
