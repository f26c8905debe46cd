"""Which cache engine goes with a backend; knows nothing else of the backend."""

from sarathi.config.backend import BackendSpec
from sarathi.worker.cache_engine.base import CacheEngine, CacheSettingsError, CacheShape


def create_cache_engine(spec: BackendSpec, shape: CacheShape) -> CacheEngine:
    """The engine for `spec.memory`; only the one that is needed is imported.

    Raises CacheSettingsError for a budget, page or block that cannot work.
    """
    cache = _open(spec, shape)
    capacity = cache.capacity
    if capacity.tokens_in(capacity.rows) < 1:
        cache.close()
        raise CacheSettingsError(
            f"memory_bytes={shape.budget_bytes} holds {capacity.rows} pages of each tensor for requests, and one token "
            f"takes {capacity.rows_for(1)}, with the {capacity.over_read_tokens} tokens that kernels may read past it"
        )
    return cache


def _open(spec: BackendSpec, shape: CacheShape) -> CacheEngine:
    if spec.is_paged:
        from sarathi.worker.cache_engine.paged import PagedCacheEngine

        return PagedCacheEngine(spec.block_size, shape)
    from sarathi.worker.cache_engine.vattn import vATTNCacheEngine

    return vATTNCacheEngine(spec, shape)
