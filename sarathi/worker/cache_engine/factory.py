"""Creates the cache engine of a backend."""

import torch

from sarathi.config.backend import BackendSpec
from sarathi.worker.cache_engine.base import CacheEngine, CacheSettingsError, KVCacheSpec

_GOOD_REGION_BYTES, _MOST_REGION_BYTES = 2**39, 2**41 - 1  # FlashAttention 3 fails where a region has 2^41
_GOOD_AREAS, _MOST_AREAS = 40_000, 56_000  # of vm.max_map_count, 65,530 by default; a slot takes two in each region
_MOST_BYTES = 2**46  # of addresses: half of what a process has


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
    """Sequences of ended requests that may be kept: more cost addresses, which a device may not have.

    At least as many as may run, since each of those may copy from another one; 0 where there are not so many.
    """
    num_seqs = spec.max_num_seqs
    if backend.is_paged:
        return 4 * num_seqs
    num_regions = 2 if backend.megacache else 2 * spec.num_layers
    slot_bytes = spec.token_bytes * spec.max_model_len
    if device.type == "cuda":
        cost, good, most = slot_bytes // num_regions, _GOOD_REGION_BYTES, _MOST_REGION_BYTES
    else:
        cost, good, most = 2 * num_regions, _GOOD_AREAS, _MOST_AREAS
    num_slots = min(most // cost, _MOST_BYTES // slot_bytes) - 1  # one has the first page, on a GPU
    if num_slots < 2 * num_seqs:
        return 0
    return max(num_seqs, min(4 * num_seqs, good // cost - num_seqs, num_slots - num_seqs))


def _open(backend: BackendSpec, spec: KVCacheSpec, device: torch.device, budget_bytes: int) -> CacheEngine:
    if backend.is_paged:
        from sarathi.worker.cache_engine.paged import PagedCacheEngine

        return PagedCacheEngine(backend, spec, device, budget_bytes)
    from sarathi.worker.cache_engine.vattn import vATTNCacheEngine

    return vATTNCacheEngine(backend, spec, device, budget_bytes)
