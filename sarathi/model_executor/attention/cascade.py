"""Plans a step's cascade attention: groups of sequences become ranges of tokens, in a tensor of fixed size."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from sarathi.messages import PrefixGroup
from sarathi.model_executor.ops.types import Cascade, CascadeShape

_PER_SEQUENCE, _PER_RANGE = 4, 5
_LEAST_TILES = 4  # in a range: shorter ranges cost more to join than they save
_MOST_RANGES = 32  # of a prefix


def cascade_size(num_seqs: int, shape: CascadeShape) -> int:
    """The number of int32 values of a plan for num_seqs sequences: a multiple of 4."""
    return num_seqs * _PER_SEQUENCE + -(-(num_seqs + shape.ranges * _PER_RANGE) // 4) * 4


def as_cascade(packed: Tensor, num_seqs: int, shape: CascadeShape) -> Cascade:
    """The parts of a packed plan, [cascade_size] int32."""
    counts = [num_seqs * _PER_SEQUENCE, shape.ranges * _PER_RANGE, num_seqs]
    sequences, ranges, members = torch.split(packed[: sum(counts)], counts)
    return Cascade(sequences.view(num_seqs, _PER_SEQUENCE), ranges.view(shape.ranges, _PER_RANGE), members)


def plan_cascade(
    groups: Sequence[PrefixGroup], slots: Sequence[int], num_seqs: int, shape: CascadeShape
) -> list[int]:  # fmt: skip
    """The packed plan of a step with num_seqs sequences, padding included. slots: of the sequences that members index.

    A group's members are divided into tiles of queries, and its tokens into ranges of about the same length for all
    groups. They take ranges in order; a group for whose tiles too few are left is dropped.
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
    """Each group with its tiles, members whose queries are attended together; a group's tiles differ little in size."""
    tiles: list[tuple[PrefixGroup, Sequence[int]]] = []
    for group in groups:
        count = -(-len(group.members) // shape.members)
        size = -(-len(group.members) // count)
        if len(tiles) + count <= shape.ranges:
            tiles += [(group, group.members[first : first + size]) for first in range(0, len(group.members), size)]
    return tiles


def _longest_range(prefixes: Sequence[int], shape: CascadeShape) -> int:
    """The least range length, a multiple of the tile, that gives these prefixes at most shape.ranges ranges."""
    low, high = _LEAST_TILES - 1, max(_LEAST_TILES, -(-max(prefixes, default=0) // shape.tile))
    while high - low > 1:
        middle = (low + high) // 2
        count = sum(len(_begins(tokens, middle * shape.tile, shape.tile)) for tokens in prefixes)
        low, high = (low, middle) if count <= shape.ranges else (middle, high)
    return high * shape.tile


def _begins(tokens: int, longest: int, tile: int) -> range:
    """First tokens of a prefix's ranges. They have equal length, a multiple of the tile, except the last one."""
    count = min(_MOST_RANGES, -(-tokens // longest))
    return range(0, tokens, -(-tokens // (count * tile)) * tile)
