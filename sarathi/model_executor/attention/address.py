"""Where K and V of a step's requests are in the cache: slots, or block tables."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class CacheLayer(NamedTuple):
    """One layer's cache, [rows, cols, num_kv_heads, head_size] each, and how many tokens a query sees (None: all).

    Virtual memory: row = slot, cols = max tokens. Paged: row = block, cols = tokens of a block.
    """

    k: Tensor
    v: Tensor
    window: int | None


@dataclass(frozen=True, slots=True)
class SlotAddress:
    """Chunk i lies in row `slots[i]`, its token t in column t."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockAddress:
    """Token t of chunk i lies in row `block_tables[i][t // block_size]`, column t % block_size."""

    block_tables: tuple[list[int], ...]
    block_size: int


Address = SlotAddress | BlockAddress
