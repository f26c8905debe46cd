"""Creates the cache engine of a backend."""

import torch

from sarathi.config.backend import BackendSpec
from sarathi.worker.cache_engine.base import CacheEngine, CacheSettingsError, KVCacheSpec

_MOST_REGION_BYTES = 2**39  # FlashAttention 3 fails where a region has 2^41
_MOST_AREAS = 40_000  # of vm.max_map_count, 65,530 by default; a slot takes two or more in each region


def create_cache_engine(
    backend: BackendSpec, spec: KVCacheSpec, device: torch.device, budget_bytes: int
) -> CacheEngine:
    """The engine of `backend.memory`. Raises CacheSettingsError for a budget, page or block that cannot work."""
    cache = _open(backend, spec, device, budget_bytes)
    capacity = cache.capacity
    if capacity.tokens_in(capacity.rows) < 1:
        cache.close()
        raise CacheSettingsError(
            f"memory_bytes={budget_bytes} holds {capacity.rows} pages of each tensor for requests, and one token "
            f"takes {capacity.rows_for(1)}, with the {capacity.over_read_tokens} tokens that kernels may read past it"
        )
    return cache


def num_retained(backend: BackendSpec, spec: KVCacheSpec, device: torch.device) -> int:
    """Sequences of ended requests that may be kept: more cost addresses, which a device may not have."""
    wanted = 4 * spec.max_num_seqs
    if backend.is_paged:
        return wanted
    num_regions = 2 if backend.megacache else 2 * spec.num_layers
    if device.type == "cuda":
        most = _MOST_REGION_BYTES * num_regions // (spec.token_bytes * spec.max_model_len)
    else:
        most = _MOST_AREAS // (2 * num_regions)
    return max(spec.max_num_seqs, min(wanted, most - spec.max_num_seqs))


def _open(backend: BackendSpec, spec: KVCacheSpec, device: torch.device, budget_bytes: int) -> CacheEngine:
    if backend.is_paged:
        from sarathi.worker.cache_engine.paged import PagedCacheEngine

        return PagedCacheEngine(backend, spec, device, budget_bytes)
    from sarathi.worker.cache_engine.vattn import vATTNCacheEngine

    return vATTNCacheEngine(backend, spec, device, budget_bytes)
