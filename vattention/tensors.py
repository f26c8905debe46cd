"""Reserved regions as torch tensors. Reading a part that is not mapped faults."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.dlpack import from_dlpack

from vattention.regions import Region


def region_tensor(region: Region, dtype: torch.dtype | str) -> torch.Tensor:
    """The whole region as a one-dimensional tensor of `dtype`. It keeps the addresses alive, not the pages.

    The region is exported as bytes, because DLPack lacks some of torch's types, such as float8.
    """
    return typed(from_dlpack(region.__dlpack__()), dtype)


def typed(data: torch.Tensor, dtype: torch.dtype | str) -> torch.Tensor:
    """The bytes viewed as `dtype`."""
    return data.view(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def token_view(
    region: torch.Tensor, slot_bytes: int, token_bytes: int, max_tokens: int, shape: Sequence[int], offset: int = 0
) -> torch.Tensor:
    """[num_slots, max_tokens, *shape] over a region, `offset` elements into each token.

    Slots are `slot_bytes` apart and tokens `token_bytes`; the rest of a slot's last page is skipped.
    """
    num_slots = region.numel() * region.itemsize // slot_bytes
    inner = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        inner[dim] = inner[dim + 1] * shape[dim + 1]
    strides = [slot_bytes // region.itemsize, token_bytes // region.itemsize, *inner]
    return region.as_strided([num_slots, max_tokens, *shape], strides, offset)
