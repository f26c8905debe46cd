"""Contiguous slots seen as a paged cache whose block table is arithmetic. Knows no kernel.

For kernels that can find a sequence only through a block table: no byte moves, the pages of a slot are simply in order.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor


class Pages(NamedTuple):
    """One tensor of the cache as pages; page p of slot s is row ``s * slot_step + p * page_step``."""

    pages: Tensor  # [rows, page_tokens, kv_heads, head_size], a view that overlaps itself unless the steps fit
    slot_step: int
    page_step: int


def as_pages(cache: Tensor, page_tokens: int) -> Pages:
    """cache: [slots, tokens, kv_heads, head_size] with any strides. Rows are as far apart as both strides allow.

    A slot's last page may reach past its tokens; of the last slot's there is as much as the cache's storage holds.
    """
    slot_stride, token_stride, *inner = cache.stride()
    page_stride = page_tokens * token_stride
    unit = gcd(slot_stride, page_stride)
    last = (cache.shape[0] - 1) * slot_stride + (-(-cache.shape[1] // page_tokens) - 1) * page_stride
    last = min(last, _elements_from(cache) - _extent((page_tokens, *cache.shape[2:]), (token_stride, *inner)))
    shape = (last // unit + 1, page_tokens, *cache.shape[2:])
    return Pages(cache.as_strided(shape, (unit, token_stride, *inner)), slot_stride // unit, page_stride // unit)


def _elements_from(tensor: Tensor) -> int:
    """Of the storage, from the tensor's first one on."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() - int(tensor.storage_offset())


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first one of such a tensor to its last one, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def page_table(slots: Tensor, num_pages: int, pages: Pages) -> Tensor:
    """The block table [B, num_pages] int32 of these slots, [B] int32. Device work only."""
    steps = torch.arange(num_pages, device=slots.device, dtype=torch.int32) * pages.page_step
    return slots[:, None] * pages.slot_step + steps
