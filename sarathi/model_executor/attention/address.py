"""Where the keys and values of a step's sequences are in the cache: slots of virtual memory, or block tables."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class CacheLayer(NamedTuple):
    """The cache of one layer, and how many tokens a query of this layer sees, its own included (None: all).

    k, v: [slots, max_tokens, num_kv_heads, head_size] on virtual memory, [blocks, block_size, num_kv_heads, head_size]
    where paged. Any strides with the last one 1.
    """

    k: Tensor
    v: Tensor
    window: int | None


@dataclass(frozen=True, slots=True)
class SlotAddress:
    """Token t of sequence i is at [slots[i], t] of the cache."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockAddress:
    """Token t of sequence i is at [block_tables[i][t // block_size], t % block_size] of the cache.

    slots: a number of each sequence, unique among running ones: blocks may be shared.
    """

    block_tables: tuple[list[int], ...]
    block_size: int
    slots: tuple[int, ...] = ()


Address = SlotAddress | BlockAddress
