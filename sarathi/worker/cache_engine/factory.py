"""Creates the cache engine of a backend."""

import torch

from sarathi.config.backend import BackendSpec
from sarathi.worker.cache_engine.base import CacheEngine, CacheSettingsError, KVCacheSpec


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


def _open(backend: BackendSpec, spec: KVCacheSpec, device: torch.device, budget_bytes: int) -> CacheEngine:
    if backend.is_paged:
        from sarathi.worker.cache_engine.paged import PagedCacheEngine

        return PagedCacheEngine(backend, spec, device, budget_bytes)
    from sarathi.worker.cache_engine.vattn import vATTNCacheEngine

    return vATTNCacheEngine(backend, spec, device, budget_bytes)
