"""The block space manager that a configuration asks for."""

from __future__ import annotations

from sarathi.config.backend import BackendSpec
from sarathi.core.block_space_manager.base import BlockSpaceManager
from sarathi.core.block_space_manager.paged import BlockPool, PagedBlockSpaceManager
from sarathi.core.block_space_manager.prefix_caching.eviction import POLICIES
from sarathi.core.block_space_manager.prefix_caching.manager import PrefixCachingBlockSpaceManager
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.messages import CacheCapacity


def make_block_space_manager(
    spec: BackendSpec, capacity: CacheCapacity, eviction: str = "lru", *, cascades: bool = False
) -> BlockSpaceManager:
    """The block space manager for a backend's memory model, over a cache of this capacity."""
    if capacity.num_retained:
        pool = BlockPool(capacity.rows) if spec.is_paged else None
        return PrefixCachingBlockSpaceManager(capacity, POLICIES[eviction], pool, cascades=cascades)
    return PagedBlockSpaceManager(capacity) if spec.is_paged else VirtualBlockSpaceManager(capacity)
