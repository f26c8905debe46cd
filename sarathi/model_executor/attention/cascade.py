"""The plan of a step's cascade attention: from groups of sequences to ranges of tokens, in numbers of fixed count."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from sarathi.messages import PrefixGroup
from sarathi.model_executor.ops.types import Cascade, CascadeShape

_PER_SEQUENCE, _PER_RANGE = 4, 5
_LEAST_TILES = 4  # of tokens in a range: shorter ones cost more to join than they gain
_MOST_RANGES = 32  # of a prefix


def cascade_size(num_seqs: int, shape: CascadeShape) -> int:
    """How many int32 numbers a plan for num_seqs sequences has: a multiple of 4."""
    return num_seqs * _PER_SEQUENCE + -(-(num_seqs + shape.ranges * _PER_RANGE) // 4) * 4


def as_cascade(packed: Tensor, num_seqs: int, shape: CascadeShape) -> Cascade:
    """The parts of a plan's numbers, [cascade_size] int32."""
    counts = [num_seqs * _PER_SEQUENCE, shape.ranges * _PER_RANGE, num_seqs]
    sequences, ranges, members = torch.split(packed[: sum(counts)], counts)
    return Cascade(sequences.view(num_seqs, _PER_SEQUENCE), ranges.view(shape.ranges, _PER_RANGE), members)


def plan_cascade(
    groups: Sequence[PrefixGroup], slots: Sequence[int], num_seqs: int, shape: CascadeShape
) -> list[int]:  # fmt: skip
    """The numbers of a step of num_seqs sequences, padding included. slots: of those that members index.

    A group's members are divided into tiles of queries, and its tokens into ranges of about the same length for all
    groups. Groups come first to last; those whose tiles find no range any more are left out.
    """
    sequences = [[0] * _PER_SEQUENCE for _ in range(num_seqs)]
    ranges: list[list[int]] = []
    members: list[int] = []
    tiles = _query_tiles(groups, shape)
    longest = _longest_range([group.num_tokens for group, _ in tiles], shape)
    for group, tile in tiles:
        tokens, slot = group.num_tokens, slots[group.members[0]]
        begins = _begins(tokens, longest, shape.tile)
        for index, member in enumerate(tile):
            sequences[member] = [tokens, len(ranges), len(begins), index]
        ends = [*begins[1:], tokens]
        ranges += [[slot, *both, len(members), len(tile)] for both in zip(begins, ends, strict=True)]
        members += tile
    ranges += [[0] * _PER_RANGE] * (shape.ranges - len(ranges))
    numbers = [*chain.from_iterable(sequences), *chain.from_iterable(ranges), *members]
    return numbers + [0] * (cascade_size(num_seqs, shape) - len(numbers))


def _query_tiles(groups: Sequence[PrefixGroup], shape: CascadeShape) -> list[tuple[PrefixGroup, Sequence[int]]]:
    """Groups, and members whose queries are attended together: tiles of about the same size for each group."""
    tiles: list[tuple[PrefixGroup, Sequence[int]]] = []
    for group in groups:
        count = -(-len(group.members) // shape.members)
        size = -(-len(group.members) // count)
        if len(tiles) + count <= shape.ranges:
            tiles += [(group, group.members[first : first + size]) for first in range(0, len(group.members), size)]
    return tiles


def _longest_range(prefixes: Sequence[int], shape: CascadeShape) -> int:
    """The least multiple of the tile, in tokens, with which prefixes of these tokens have at most shape.ranges."""
    low, high = _LEAST_TILES - 1, max(_LEAST_TILES, -(-max(prefixes, default=0) // shape.tile))
    while high - low > 1:
        middle = (low + high) // 2
        count = sum(len(_begins(tokens, middle * shape.tile, shape.tile)) for tokens in prefixes)
        low, high = (low, middle) if count <= shape.ranges else (middle, high)
    return high * shape.tile


def _begins(tokens: int, longest: int, tile: int) -> range:
    """Where the ranges of a prefix begin: of equal length, a multiple of the tile, but for the last one."""
    count = min(_MOST_RANGES, -(-tokens // longest))
    return range(0, tokens, -(-tokens // (count * tile)) * tile)
