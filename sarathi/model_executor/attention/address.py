"""Addresses of a step's sequences in the cache: slots of virtual memory, or block tables."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class CacheLayer(NamedTuple):
    """The cache of one layer. window: tokens that a query attends to, its own included; None: all.

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

    slots: a number for each sequence, unique among running ones, which block numbers are not if blocks are shared.
    """

    block_tables: tuple[list[int], ...]
    block_size: int
    slots: tuple[int, ...] = ()


Address = SlotAddress | BlockAddress
