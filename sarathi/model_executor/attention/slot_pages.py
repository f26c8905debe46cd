"""Views of contiguous slots that a kernel library can address. No byte moves.

A library without an argument for slots takes block tables only: it gets a slot as consecutive pages, whose block table
is arithmetic. A library that cannot address all slots at once gets one slot for each call. The limits:

    2^40 bytes   between neighbours in any dimension of a TMA descriptor (cuTensorMapEncodeTiled, globalStrides), also
                 in a dimension of size 1. Of a cache [slots, tokens, heads, dim] the slot stride is the largest. It
                 reaches the limit at 2^24 tokens of 64 KiB (Llama-3-8B with megacache).
    2^31 pages   in a block table of int32
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_STRIDE_BYTES = 2**40  # exclusive
_MAX_PAGES = 2**31


class Pages(NamedTuple):
    """The cache as pages: page p of slot s is pages[s * slot_step + p * page_step]."""

    pages: Tensor  # [entries, page_tokens, num_kv_heads, head_size]; entries overlap unless one step divides the other
    slot_step: int
    page_step: int


def as_pages(cache: Tensor, page_tokens: int) -> Pages:
    """cache: [slots, tokens, num_kv_heads, head_size], any strides. Entries are gcd(slot, page stride) apart.

    The last page of a slot may extend past its tokens, and that of the last slot as far as the cache's storage does.
    """
    slot_stride, token_stride, *inner = cache.stride()
    page_stride = page_tokens * token_stride
    unit = gcd(slot_stride, page_stride)
    last = (cache.shape[0] - 1) * slot_stride + (-(-cache.shape[1] // page_tokens) - 1) * page_stride
    last = min(last, _elements_from(cache) - _extent((page_tokens, *cache.shape[2:]), (token_stride, *inner)))
    shape = (last // unit + 1, page_tokens, *cache.shape[2:])
    return Pages(cache.as_strided(shape, (unit, token_stride, *inner)), slot_stride // unit, page_stride // unit)


def fits_block_table(cache: Tensor, page_tokens: int) -> bool:
    """Whether int32 can index every entry of as_pages(cache, page_tokens)."""
    slot_stride, token_stride = cache.stride()[:2]
    return cache.shape[0] * slot_stride // gcd(slot_stride, page_tokens * token_stride) <= _MAX_PAGES


def has_tma_strides(cache: Tensor) -> bool:
    """Whether a TMA descriptor can hold the strides of the cache."""
    return cache.stride(0) * cache.element_size() < _MAX_STRIDE_BYTES


def page_table(slots: Tensor, num_pages: int, pages: Pages) -> Tensor:
    """The block table, [B, num_pages] int32, of these slots, [B] int32. Device work only."""
    steps = torch.arange(num_pages, device=slots.device, dtype=torch.int32) * pages.page_step
    return slots[:, None] * pages.slot_step + steps


def one_slot(cache: Tensor, slot: int) -> Tensor:
    """The slot as a cache [1, tokens, num_kv_heads, head_size] whose slot stride is within every limit."""
    return cache[slot].as_strided((1, *cache.shape[1:]), cache.stride()[1:2] + cache.stride()[1:])


def _elements_from(tensor: Tensor) -> int:
    """Elements of the storage from the tensor's first one on."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() - int(tensor.storage_offset())


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one of such a tensor, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
