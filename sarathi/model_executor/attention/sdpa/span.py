"""Attention of one sequence's queries over one contiguous run of keys, by torch; knows no batch and no addresses."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sarathi.model_executor.placement import Placement

UNLIMITED = -1


class Window(NamedTuple):
    """Keys that a query at position p sees: [p - left, p + right]; UNLIMITED on a side for no limit."""

    left: int
    right: int


class Span(NamedTuple):
    """Queries [query_start, query_end) of the batch over keys [key_start, key_end) of row `row`.

    mask: [queries, keys], 0 where seen and -inf where not; None where all are seen, or where `causal` says it.
    """

    query_start: int
    query_end: int
    row: int
    key_start: int
    key_end: int
    mask: Tensor | None
    causal: bool


class Reach(NamedTuple):
    """The part of a sequence that `num_queries` queries, the last of its `num_keys` tokens, can see: [first, last)."""

    first: int
    last: int


def reach(num_queries: int, num_keys: int, window: Window) -> Reach:
    """Keys outside are seen by no query, so that they need not be read."""
    first_position = num_keys - num_queries
    first = 0 if window.left == UNLIMITED else min(num_keys, max(0, first_position - window.left))
    last = num_keys if window.right == UNLIMITED else min(num_keys, num_keys + window.right)
    return Reach(first, last)


def visibility(num_queries: int, num_keys: int, window: Window, place: Placement) -> tuple[Tensor | None, bool]:
    """(mask, causal) over the reached keys; queries stand at the end of the keys, as FlashAttention aligns them.

        keys    0 1 2 3 4
    query 3     . . . .          window (UNLIMITED, 0): causal
    query 4     . . . . .
    """
    if num_queries == 1 and window.right in (0, UNLIMITED):
        return None, False
    if num_queries == num_keys and window.right == 0 and (window.left == UNLIMITED or window.left >= num_keys - 1):
        return None, True
    if window == (UNLIMITED, UNLIMITED):
        return None, False
    first, last = reach(num_queries, num_keys, window)
    distance = torch.arange(first, last, device=place.device) - torch.arange(
        num_keys - num_queries, num_keys, device=place.device
    ).unsqueeze(1)  # [queries, keys], key's position minus query's
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window.left != UNLIMITED:
        hidden |= distance < -window.left
    if window.right != UNLIMITED:
        hidden |= distance > window.right
    return torch.zeros_like(distance, dtype=place.dtype).masked_fill_(hidden, float("-inf")), False


def attend(query: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
    """query [T, Hq, D]; keys, values [rows, cols, Hkv, D], read in place and only where spans say -> [T, Hq, D].

    Spans cover the queries in order.
    """
    by_head = query.transpose(0, 1).unsqueeze(0)  # [1, Hq, T, D]
    queries = torch.split(by_head, [span.query_end - span.query_start for span in spans], dim=2)
    gqa = query.shape[1] != keys.shape[2]
    parts = []
    for part, span, k, v in zip(queries, spans, _seen(keys, spans), _seen(values, spans), strict=True):
        seen = F.scaled_dot_product_attention(
            part, k, v, attn_mask=span.mask, is_causal=span.causal, scale=scale, enable_gqa=gqa
        )
        parts.append(seen.transpose(1, 2))  # [1, queries, Hq, D], contiguous
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).squeeze(0)


def _seen(cache: Tensor, spans: Sequence[Span]) -> Iterator[Tensor]:
    """Views of a cache [rows, cols, H, D], one for each span, [1, H, keys, D]; one call each instead of three."""
    _, _, heads, size = cache.shape
    row_stride, col_stride, head_stride, element_stride = cache.stride()
    strides, base = (row_stride, head_stride, col_stride, element_stride), cache.storage_offset()
    for span in spans:
        offset = base + span.row * row_stride + span.key_start * col_stride
        yield cache.as_strided((1, heads, span.key_end - span.key_start, size), strides, offset)
