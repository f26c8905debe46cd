"""Which cache engine goes with a backend; knows nothing else of the backend."""

from sarathi.config.backend import BackendSpec
from sarathi.worker.cache_engine.base import CacheEngine, CacheShape


def create_cache_engine(spec: BackendSpec, shape: CacheShape) -> CacheEngine:
    """The engine for `spec.memory`; only the one that is needed is imported.

    Raises CacheSettingsError for a budget, page or block that cannot work.
    """
    if spec.is_paged:
        from sarathi.worker.cache_engine.paged import PagedCacheEngine

        return PagedCacheEngine(spec.block_size, shape)
    from sarathi.worker.cache_engine.vattn import vATTNCacheEngine

    return vATTNCacheEngine(spec, shape)
