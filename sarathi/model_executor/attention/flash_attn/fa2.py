"""FlashAttention 2 (Dao, 2023), the package flash-attn."""

import importlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, KernelCapabilities, VarlenStep

BLOCK_MULTIPLE = 256  # the kernel refuses other block sizes


class FlashAttention2:
    """The varlen function over a block table. Raises ImportError if the package is missing."""

    name = "flash-attn"
    capabilities = KernelCapabilities(
        frozenset({torch.bfloat16, torch.float16}), 256, frozenset({8, 9, 10, 12}), window=True,
        over_read_tokens=0, contiguous=False, block_multiple=BLOCK_MULTIPLE,
    )  # fmt: skip

    def __init__(self) -> None:
        self._varlen = importlib.import_module("flash_attn").flash_attn_varlen_func

    def schedule(self, params: AttentionParams, step: VarlenStep, columns: int) -> Tensor | None:
        """See Provider. The library has none; returns the cumulative sum of lengths, which it takes instead."""
        return pad(step.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def attend(
        self,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        step: VarlenStep,
        params: AttentionParams,
        out: Tensor | None = None,
    ) -> Tensor:
        """See Provider."""
        left = -1 if params.window is None else params.window - 1
        result: Tensor = self._varlen(
            q,
            *cache,
            cu_seqlens_q=step.starts,
            cu_seqlens_k=step.schedule,
            max_seqlen_q=step.max_new,
            max_seqlen_k=step.max_length,
            softmax_scale=params.scale,
            causal=True,
            window_size=(left, 0 if params.window is not None else -1),
            block_table=step.block_table,
        )
        return result if out is None else out.copy_(result)
