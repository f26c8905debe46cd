"""FlashAttention 4, the CuTe rewrite in flash_attn.cute (package flash-attn-4)."""

import importlib

import torch
from torch import Tensor

from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, KernelCapabilities, VarlenStep


class FlashAttention4:
    """The varlen function over a page table. Raises ImportError if the package is missing."""

    name = "flash-attn-4"
    capabilities = KernelCapabilities(
        frozenset({torch.bfloat16, torch.float16}), 128, frozenset({9, 10, 11}), window=True,
        over_read_tokens=255, contiguous=False, block_multiple=1,
    )  # fmt: skip

    def __init__(self) -> None:
        self._varlen = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

    def schedule(self, params: AttentionParams, step: VarlenStep, columns: int) -> Tensor | None:
        """See Provider. The library has none."""
        return None

    def attend(
        self,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        step: VarlenStep,
        params: AttentionParams,
        out: Tensor | None = None,
    ) -> Tensor:
        """See Provider."""
        windowed = params.window is not None
        result = self._varlen(
            q,
            *cache,
            cu_seqlens_q=step.starts,
            seqused_k=step.lengths,
            max_seqlen_q=step.max_new,
            page_table=step.block_table,
            softmax_scale=params.scale,
            causal=not windowed,
            window_size=(params.window - 1, 0) if params.window is not None else (None, None),
        )
        attended: Tensor = result[0] if isinstance(result, tuple) else result
        return attended if out is None else out.copy_(attended)
