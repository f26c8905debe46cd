"""From lengths and addresses to what torch attends over: spans of rows or of gathered blocks; knows no tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.attention.address import Address, BlockAddress
from sarathi.model_executor.attention.sdpa.span import Reach, Span, Window, attend, reach, visibility
from sarathi.model_executor.placement import Placement


class Part(NamedTuple):
    """One sequence of a step: its `num_queries` new tokens are the last of `num_keys`."""

    num_queries: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class View:
    """How layers with one window read: `blocks`, [N] int64, are gathered into one row first; None reads in place."""

    spans: tuple[Span, ...]
    blocks: Tensor | None

    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """query [T, Hq, D] over caches [rows, cols, Hkv, D] -> [T, Hq, D]."""
        if self.blocks is not None:
            k_cache, v_cache = _gather(k_cache, self.blocks), _gather(v_cache, self.blocks)
        return attend(query, k_cache, v_cache, self.spans, scale)

    def shifted(self, starts: Sequence[int]) -> "View":
        """The same spans where sequence i begins at column starts[i] of its row."""
        moved = [
            span._replace(key_start=span.key_start + start, key_end=span.key_end + start)
            for span, start in zip(self.spans, starts, strict=False)
        ]
        return View(tuple(moved), self.blocks)


class _Run(NamedTuple):
    """Where a reached part of a sequence starts: column `first` of row `row`."""

    row: int
    first: int


def make_view(parts: Sequence[Part], address: Address, window: Window, place: Placement) -> View:
    """Spans of all parts, in order; masks are of the model's dtype."""
    reaches = [reach(part.num_queries, part.num_keys, window) for part in parts]
    runs, blocks = _locate(reaches, address)
    spans, query = [], 0
    for part, seen, run in zip(parts, reaches, runs, strict=True):
        mask, causal = visibility(part.num_queries, part.num_keys, window, place)
        end = run.first + seen.last - seen.first
        spans.append(Span(query, query + part.num_queries, run.row, run.first, end, mask, causal))
        query += part.num_queries
    return View(tuple(spans), None if blocks is None else torch.tensor(blocks, dtype=torch.int64, device=place.device))


def write_index(parts: Sequence[Part], address: Address, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, cols) of the parts' new tokens in the cache, [T] int64 each."""
    rows: list[int] = []
    cols: list[int] = []
    for index, (count, length) in enumerate(parts):
        positions = range(length - count, length)
        if isinstance(address, BlockAddress):
            size, table = address.block_size, address.block_tables[index]
            rows.extend([table[position // size] for position in positions])
            cols.extend([position % size for position in positions])
        else:
            rows.extend([address.slots[index]] * count)
            cols.extend(positions)
    return torch.tensor(rows, device=device), torch.tensor(cols, device=device)


def _locate(reaches: Sequence[Reach], address: Address) -> tuple[list[_Run], list[int] | None]:
    if not isinstance(address, BlockAddress):
        return [_Run(slot, seen.first) for slot, seen in zip(address.slots, reaches, strict=True)], None
    size = address.block_size
    runs: list[_Run] = []
    blocks: list[int] = []
    for table, (first, last) in zip(address.block_tables, reaches, strict=True):
        runs.append(_Run(0, len(blocks) * size + first % size))
        blocks.extend(table[first // size : -(-last // size)])
    return runs, blocks


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """cache [blocks, block_size, H, D] -> one row of the chosen blocks, [1, N * block_size, H, D]."""
    return cache.index_select(0, blocks).flatten(0, 1).unsqueeze(0)
