"""KV cache that is contiguous in virtual memory and mapped to physical pages on demand.

`VirtualKVCache` is the interface; `Arena` holds other tensors whose memory is mapped and released. docs/allocator.md
explains both. The functions are those of the original vAttention release, on one cache of the module's own.
"""

from vattention import _interpreter  # noqa: F401  # first: refuses sub-interpreters, in which the others hang
from vattention.arena import Arena
from vattention.classic import ClassicAPI, as_function
from vattention.errors import (
    DeviceError,
    ForkError,
    IntegrityError,
    NoFreeSlotError,
    OutOfMemoryError,
    VAttentionError,
)
from vattention.kv_cache import VirtualKVCache, report_faults
from vattention.stats import CacheStats

_classic = ClassicAPI()
init_kvcache = as_function(_classic.init_kvcache)
reserve_physical_pages = as_function(_classic.reserve_physical_pages)
alloc_new_batch_idx = as_function(_classic.alloc_new_batch_idx)
free_batch_idx = as_function(_classic.free_batch_idx)
step = as_function(_classic.step)
step_async = as_function(_classic.step_async)
num_free_kvblocks = as_function(_classic.num_free_kvblocks)
set_deferred_reclamation = as_function(_classic.set_deferred_reclamation)
map_common_pages = as_function(_classic.map_common_pages)
show_kvcache_config = as_function(_classic.show_kvcache_config)
show_allocator_state = as_function(_classic.show_allocator_state)
set_verbose = as_function(_classic.set_verbose)
cleanup = as_function(_classic.cleanup)

__all__ = [
    "Arena",
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
    "report_faults",
    "reserve_physical_pages",
    "set_deferred_reclamation",
    "set_verbose",
    "show_allocator_state",
    "show_kvcache_config",
    "step",
    "step_async",
]
