"""The interface of a FlashAttention library: its capabilities, and one call for a whole step."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sarathi.model_executor.attention.metadata import SlotTokens


@dataclass(frozen=True, slots=True)
class KernelCapabilities:
    """What the build of a library can do. `choice` compares it with what a model and a memory require."""

    dtypes: frozenset[torch.dtype]
    max_head_size: int
    compute_capabilities: frozenset[int]  # major numbers
    window: bool  # sliding window
    over_read_tokens: int  # how far kernels may read past a sequence's last token; the cache needs memory there
    contiguous: bool = True  # takes the index of each sequence's slot in the cache
    block_multiple: int | None = None  # the size of a block must be a multiple of this; None: no paged KV cache


@dataclass(frozen=True, slots=True)
class VarlenStep:
    """Lengths and cache addresses of the B sequences of a step, int32 on the device. T tokens are new.

    new tokens    |--- sequence 0 ---|- 1 -|- 2 -|        starts   [B + 1], first 0, last T
    in the cache  lengths[b], the new tokens included
    """

    starts: Tensor  # [B + 1]
    lengths: Tensor  # [B]
    slots: Tensor | None  # [B]; None where paged
    block_table: Tensor | None  # [B, blocks]; None on slots
    max_new: int
    max_length: int  # bound on lengths
    causal: bool  # False where each sequence has one new token: no mask is needed
    schedule: Tensor | None = None  # the library's division of work, made once for all layers
    only: SlotTokens | None = None  # the sequence, if B = 1 and the host knows its slot


class AttentionParams(NamedTuple):
    """Parameters that are the same in all steps, for layers of one window."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    scale: float
    window: int | None  # tokens that a query attends to, its own included; None: all


class Provider(Protocol):
    """A FlashAttention library. Keeps no state of a step."""

    name: str
    capabilities: KernelCapabilities

    def schedule(self, params: AttentionParams, step: VarlenStep, columns: int) -> Tensor | None:
        """The division of work that the layers of a step share; None for a library without one.

        columns: tokens of a slot or block. Safe to capture in a CUDA graph.
        """

    def attend(
        self,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        step: VarlenStep,
        params: AttentionParams,
        out: Tensor | None = None,
    ) -> Tensor:
        """q: [T, num_heads, head_size]; cache: keys and values, [slots or blocks, columns, num_kv_heads, head_size].

        The step's keys and values are in the cache. Returns q's shape; `out`, contiguous, if given.
        """


def scheduled(step: VarlenStep, provider: Provider, params: AttentionParams, columns: int) -> VarlenStep:
    """The step with the provider's division of its work."""
    return replace(step, schedule=provider.schedule(params, step, columns))
