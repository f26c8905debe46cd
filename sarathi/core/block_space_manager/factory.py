"""Which ledger goes with a backend. Knows nothing else of the backend."""

from __future__ import annotations

from sarathi.config.backend import BackendSpec
from sarathi.core.block_space_manager.manager import BlockSpaceManager
from sarathi.core.block_space_manager.paged import PagedBlockSpaceManager
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.messages import CacheCapacity


def make_block_space_manager(spec: BackendSpec, capacity: CacheCapacity) -> BlockSpaceManager:
    """A ledger over a cache of this capacity."""
    return PagedBlockSpaceManager(capacity) if spec.is_paged else VirtualBlockSpaceManager(capacity)
