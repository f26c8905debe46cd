"""FlashAttention 3 (Shah et al., 2024), in any of the packages that contain it.

The packages compile the same operator with different features disabled, and its last arguments differ between them.
Therefore arguments are passed by the names in the operator's schema.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, KernelCapabilities, VarlenStep
from sarathi.model_executor.attention.metadata import SlotTokens
from sarathi.model_executor.attention.slot_pages import one_slot

LONG_CHUNK = 2048  # new tokens: from this many on the kernel for one sequence is mostly faster than that for a batch
_BFLOAT16 = frozenset({torch.bfloat16})
_BOTH = frozenset({torch.bfloat16, torch.float16})
_HOPPER = frozenset({9})
_OVER_READ_TOKENS = 191  # whole tiles of keys are copied, 80 to 192 tokens by head size and mask
_FULL_DEVICE = 128  # sequences times KV heads: from this many on splitting a sequence costs more than it saves


class _Package(NamedTuple):
    module: str
    operators: str  # namespace under torch.ops
    install: str
    capabilities: KernelCapabilities
    has_single: bool  # has the kernels for sequences of one length, without starts


PACKAGES = {
    "flash_attn_interface": _Package(
        "flash_attn_interface",
        "flash_attn_3",
        "build the folder hopper of FlashAttention's repository",
        KernelCapabilities(_BOTH, 256, _HOPPER, window=True, over_read_tokens=_OVER_READ_TOKENS, block_multiple=1),
        has_single=True,
    ),
    "fa3-fwd": _Package(
        "fa3_fwd_interface",
        "fa3_fwd",
        "pip install fa3-fwd",
        KernelCapabilities(_BFLOAT16, 256, _HOPPER, window=False, over_read_tokens=_OVER_READ_TOKENS),
        has_single=True,
    ),
    "vllm-flash-attn": _Package(
        "vllm.vllm_flash_attn",
        "_vllm_fa3_C",
        "pip install vllm",
        KernelCapabilities(_BOTH, 256, _HOPPER, window=True, over_read_tokens=_OVER_READ_TOKENS, block_multiple=1),
        has_single=False,
    ),
}


class FlashAttention3:
    """The build of one package. Raises ImportError if the package is missing."""

    def __init__(self, name: str) -> None:
        package = PACKAGES[name]
        importlib.import_module(package.module)  # registers the operators
        operators = getattr(torch.ops, package.operators)
        self.name = name
        self.capabilities, self._has_single = package.capabilities, package.has_single
        self._forward = operators.fwd.default
        self._schedule = operators.get_scheduler_metadata.default
        self._forward_defaults = _defaults(self._forward)
        self._schedule_defaults = _defaults(self._schedule)

    def schedule(self, params: AttentionParams, step: VarlenStep, columns: int) -> Tensor | None:
        """See Provider."""
        if self._takes_single(step):
            return None
        blocks = None if step.block_table is None else step.block_table.shape[1]
        made: Tensor = self._schedule(
            **{
                **self._schedule_defaults,
                "batch_size": step.lengths.shape[0],
                "max_seqlen_q": step.max_new,
                "max_seqlen_k": columns * (blocks or 1),
                "num_heads": params.num_heads,
                "num_heads_k": params.num_kv_heads,
                "headdim": params.head_size,
                "headdim_v": params.head_size,
                "qkv_dtype": params.dtype,
                "seqused_k": step.lengths,
                "cu_seqlens_q": step.starts,
                "page_size": None if blocks is None else columns,
                "num_splits": _num_splits(params, step),
                **_mask(params, causal=step.causal),
            }
        )
        return made

    def attend(
        self,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        step: VarlenStep,
        params: AttentionParams,
        out: Tensor | None = None,
    ) -> Tensor:
        """See Provider."""
        if step.only is not None and self._takes_single(step):
            return self._attend_single(q, cache, step.only, params, out)
        return self._run(
            params,
            causal=step.causal,
            q=q,
            k=cache[0],
            v=cache[1],
            out=out,
            cu_seqlens_q=step.starts,
            seqused_k=step.lengths,
            max_seqlen_q=step.max_new,
            page_table=step.block_table,
            kv_batch_idx=step.slots,
            scheduler_metadata=step.schedule,
            num_splits=_num_splits(params, step),
        )

    def _takes_single(self, step: VarlenStep) -> bool:
        return self._has_single and step.only is not None and step.max_new >= LONG_CHUNK

    def _attend_single(
        self,
        q: Tensor,
        cache: tuple[Tensor, Tensor],
        only: SlotTokens,
        params: AttentionParams,
        out: Tensor | None,
    ) -> Tensor:
        """Attend to the sequence's tokens in its slot as a plain tensor, a batch of one.

        The TMA descriptor includes the batch stride, which must be small: that of cache[None, slot] would be the size
        of the region.
        """
        keys, values = (one_slot(x, only.slot)[:, : only.length] for x in cache)
        given = None if out is None else out[None]
        return self._run(params, causal=True, q=q[None], k=keys, v=values, out=given, num_splits=1)[0]

    def _run(self, params: AttentionParams, *, causal: bool, **given: Any) -> Tensor:
        fixed = {"softmax_scale": params.scale, **_mask(params, causal=causal)}
        results: Sequence[Tensor] = self._forward(**{**self._forward_defaults, **fixed, **given})
        return results[0]


def _mask(params: AttentionParams, *, causal: bool) -> dict[str, Any]:
    left = -1 if params.window is None else params.window - 1
    right = 0 if params.window is not None else -1
    return {"is_causal": causal, "window_size_left": left, "window_size_right": right}


def _num_splits(params: AttentionParams, step: VarlenStep) -> int:
    """0: the library chooses. Its choice assumes sequences of one length, and is wrong for chunks among decodes."""
    return int(step.max_new > 1 and step.lengths.shape[0] * params.num_kv_heads >= _FULL_DEVICE)


def _defaults(operator: Any) -> dict[str, Any]:
    """A value for every argument of the schema: its default, or one that disables the feature."""
    off = {"int": 0, "float": 0.0, "bool": False}
    arguments = operator._schema.arguments
    values = {a.name: a.default_value if a.has_default_value() else off.get(str(a.type)) for a in arguments}
    neutral = {"window_size_left": -1, "window_size_right": -1, "cp_world_size": 1, "num_splits": 0}
    return {**values, **{name: value for name, value in neutral.items() if name in values}}
