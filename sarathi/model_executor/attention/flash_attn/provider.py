"""What a FlashAttention library is to us: what it can do, and one call for a whole batch. Knows no library by name."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sarathi.model_executor.attention.metadata import Home


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a provider's build can do; the factory compares it with what a model and a memory need."""

    dtypes: frozenset[torch.dtype]
    max_head_size: int
    capabilities: frozenset[int]  # major compute capabilities of the devices that it runs on
    window: bool  # sliding window
    over_read_tokens: int  # tokens past a sequence's last one that may be read: memory must be there
    contiguous: bool = True  # rows of the cache picked by an index
    block_multiple: int | None = None  # paged KV with blocks of a multiple of so many tokens; None: no paged KV


@dataclass(frozen=True, slots=True)
class VarlenStep:
    """Lengths and places of the B sequences of a step, on the device; all int32. T tokens are new.

    new tokens    |--- sequence 0 ---|- 1 -|- 2 -|        starts   [B + 1], first 0, last T
    in the cache  lengths[b], the new tokens included
    """

    starts: Tensor  # [B + 1]
    lengths: Tensor  # [B]
    rows: Tensor | None  # [B] row of a contiguous cache
    block_table: Tensor | None  # [B, blocks] of a paged one
    max_new: int
    max_length: int  # bound on lengths
    causal: bool  # False where each sequence has one new token and a mask would change nothing
    schedule: Tensor | None = None  # the provider's own division of work, made once for all layers
    only: Home | None = None  # where B = 1 on a contiguous cache, and the host knows it


class Problem(NamedTuple):
    """What stays the same over all steps of a model."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    scale: float
    window: int | None  # tokens that a query sees, its own included


class Provider(Protocol):
    """A FlashAttention library. Holds nothing of a step."""

    name: str
    abilities: Abilities

    def schedule(self, problem: Problem, step: VarlenStep, cache_cols: int) -> Tensor | None:
        """The division of work that the layers of a step share; None where the library has none.

        cache_cols: columns of a cache row (tokens of a slot or block). Safe to capture in a CUDA graph.
        """

    def attend(
        self, q: Tensor, cache: tuple[Tensor, Tensor], step: VarlenStep, problem: Problem, out: Tensor | None = None
    ) -> Tensor:
        """One call for the batch: q [T, num_heads, head_size] over the cache [rows, cols, num_kv_heads, head_size].

        The step's keys and values are in the cache. Returns q's shape: `out` where it is given, contiguous.
        """


def scheduled(step: VarlenStep, provider: Provider, problem: Problem, cache_cols: int) -> VarlenStep:
    """The step with the provider's division of its work."""
    return replace(step, schedule=provider.schedule(problem, step, cache_cols))
