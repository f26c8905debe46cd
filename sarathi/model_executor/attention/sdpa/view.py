"""Keys that torch attends over in a step: a contiguous span for each sequence, in a slot or gathered from blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sarathi.model_executor.attention.address import Address, BlockAddress
from sarathi.model_executor.placement import Placement

UNLIMITED = -1


class Window(NamedTuple):
    """A query at position p attends to keys [p - left, p + right]; UNLIMITED: no limit on that side."""

    left: int
    right: int


class Lengths(NamedTuple):
    """One sequence of a step: its `num_queries` new tokens are the last of `num_keys`."""

    num_queries: int
    num_keys: int


class Span(NamedTuple):
    """Queries [query_start, query_end) of the batch over keys [slot, key_start:key_end] of a cache.

    mask: [queries, keys], 0 where a query attends to a key, else -inf; None: no mask, or a causal one if `causal`.
    """

    query_start: int
    query_end: int
    slot: int
    key_start: int
    key_end: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class View:
    """The spans of a step for layers of one window, read in place or gathered from `blocks`, [N] int64."""

    spans: tuple[Span, ...]
    blocks: Tensor | None

    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """query: [T, Hq, D]; caches: [slots or blocks, tokens, Hkv, D], read only where the spans are -> [T, Hq, D]."""
        if self.blocks is not None:
            k_cache, v_cache = _gather(k_cache, self.blocks), _gather(v_cache, self.blocks)
        by_head = query.transpose(0, 1).unsqueeze(0)  # [1, Hq, T, D]
        queries = by_head.split_with_sizes([span.query_end - span.query_start for span in self.spans], 2)
        keys, values = _keys(k_cache, self.spans), _keys(v_cache, self.spans)
        gqa = query.shape[1] != k_cache.shape[2]
        outputs = []
        for q, span, k, v in zip(queries, self.spans, keys, values, strict=True):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=span.mask, is_causal=span.causal, scale=scale, enable_gqa=gqa
            )
            outputs.append(out.transpose(1, 2))  # [1, queries, Hq, D], contiguous
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).squeeze(0)

    def shifted(self, starts: Sequence[int]) -> "View":
        """The same spans if sequence i begins at column starts[i] of its slot."""
        moved = [
            span._replace(key_start=span.key_start + start, key_end=span.key_end + start)
            for span, start in zip(self.spans, starts, strict=False)
        ]
        return View(tuple(moved), self.blocks)


def make_view(lengths: Sequence[Lengths], address: Address, window: Window, place: Placement) -> View:
    """Spans of all sequences, in order. Masks have the model's dtype, so that layers need not convert them."""
    spans: list[Span] = []
    blocks: list[int] = []  # that are gathered into slot 0
    query, is_paged = 0, isinstance(address, BlockAddress)
    for index, each in enumerate(lengths):
        first, last = visible_range(each, window)
        if isinstance(address, BlockAddress):
            size, table = address.block_size, address.block_tables[index]
            slot, key_start = 0, len(blocks) * size + first % size
            blocks += table[first // size : -(-last // size)]
        else:
            slot, key_start = address.slots[index], first
        mask, causal = _mask(each, window, place)
        key_end = key_start + last - first
        spans.append(Span(query, query + each.num_queries, slot, key_start, key_end, mask, causal))
        query += each.num_queries
    return View(tuple(spans), torch.tensor(blocks, dtype=torch.int64, device=place.device) if is_paged else None)


def write_index(lengths: Sequence[Lengths], address: Address, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slot (or block) and column in it of each new token, [T] int64 each."""
    entries: list[int] = []
    columns: list[int] = []
    for index, (count, length) in enumerate(lengths):
        positions = range(length - count, length)
        if isinstance(address, BlockAddress):
            size, table = address.block_size, address.block_tables[index]
            entries.extend([table[position // size] for position in positions])
            columns.extend([position % size for position in positions])
        else:
            entries.extend([address.slots[index]] * count)
            columns.extend(positions)
    return torch.tensor(entries, device=device), torch.tensor(columns, device=device)


def visible_range(lengths: Lengths, window: Window) -> tuple[int, int]:
    """First and last (exclusive) position that any new token attends to. No others are read."""
    num_queries, num_keys = lengths
    first = 0 if window.left == UNLIMITED else min(num_keys, max(0, num_keys - num_queries - window.left))
    last = num_keys if window.right == UNLIMITED else min(num_keys, num_keys + window.right)
    return first, last


def _mask(lengths: Lengths, window: Window, place: Placement) -> tuple[Tensor | None, bool]:
    """(mask, causal) of a span. Queries are aligned to the end of the keys, as in FlashAttention:

        keys    0 1 2 3 4
    query 3     . . . .          window (UNLIMITED, 0): causal
    query 4     . . . . .
    """
    num_queries, num_keys = lengths
    if num_queries == 1 and window.right in (0, UNLIMITED):
        return None, False
    if num_queries == num_keys and window.right == 0 and (window.left == UNLIMITED or window.left >= num_keys - 1):
        return None, True
    if window == (UNLIMITED, UNLIMITED):
        return None, False
    keys = torch.arange(*visible_range(lengths, window), device=place.device)
    queries = torch.arange(num_keys - num_queries, num_keys, device=place.device)
    distance = keys - queries.unsqueeze(1)  # [queries, keys]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window.left != UNLIMITED:
        hidden |= distance < -window.left
    if window.right != UNLIMITED:
        hidden |= distance > window.right
    return torch.zeros_like(distance, dtype=place.dtype).masked_fill_(hidden, float("-inf")), False


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """cache: [blocks, block_size, H, D] -> the chosen blocks as one slot, [1, N * block_size, H, D]."""
    return cache.index_select(0, blocks).flatten(0, 1).unsqueeze(0)


def _keys(cache: Tensor, spans: Sequence[Span]) -> Iterator[Tensor]:
    """Views [1, H, keys, D] of a cache [slots, tokens, H, D], one for each span, by one torch call each."""
    _, _, heads, size = cache.shape
    slot_stride, token_stride, head_stride, element_stride = cache.stride()
    strides, base = (slot_stride, head_stride, token_stride, element_stride), cache.storage_offset()
    for span in spans:
        offset = base + span.slot * slot_stride + span.key_start * token_stride
        yield cache.as_strided((1, heads, span.key_end - span.key_start, size), strides, offset)
