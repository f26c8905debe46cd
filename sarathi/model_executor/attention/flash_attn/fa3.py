"""FlashAttention 3 (Shah et al., 2024), in any of the packages that carry it. Knows no memory policy.

The packages compile the same operator with different parts left out and differ in its last arguments, so arguments are
given by the names in the operator's own schema.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.attention.flash_attn.provider import Abilities, Problem, VarlenStep
from sarathi.model_executor.attention.metadata import Home

LONG_CHUNK = 2048  # tokens: from there on the kernel for one sequence is mostly faster than the one for a batch
_BFLOAT16 = frozenset({torch.bfloat16})
_BOTH = frozenset({torch.bfloat16, torch.float16})
_HOPPER = frozenset({9})
_OVERREACH = 191  # tiles of keys, 80 to 192 tokens by head size and mask, are copied whole
_FILLING = 128  # sequences times KV heads that fill the device: to split them costs more than it gains


class _Package(NamedTuple):
    module: str
    operators: str  # namespace under torch.ops
    install: str
    abilities: Abilities
    has_single: bool  # the kernels that take sequences of one length, without starts


PACKAGES = {
    "flash_attn_interface": _Package(
        "flash_attn_interface",
        "flash_attn_3",
        "build the folder hopper of FlashAttention's repository",
        Abilities(_BOTH, 256, _HOPPER, window=True, over_read_tokens=_OVERREACH, block_multiple=1),
        has_single=True,
    ),
    "fa3-fwd": _Package(
        "fa3_fwd_interface",
        "fa3_fwd",
        "pip install fa3-fwd",
        Abilities(_BFLOAT16, 256, _HOPPER, window=False, over_read_tokens=_OVERREACH),
        has_single=True,
    ),
    "vllm-flash-attn": _Package(
        "vllm.vllm_flash_attn",
        "_vllm_fa3_C",
        "pip install vllm",
        Abilities(_BOTH, 256, _HOPPER, window=True, over_read_tokens=_OVERREACH, block_multiple=1),
        has_single=False,
    ),
}


class FlashAttention3:
    """One package's build. Raises ImportError where the package is missing."""

    def __init__(self, name: str) -> None:
        package = PACKAGES[name]
        importlib.import_module(package.module)  # registers the operators
        operators = getattr(torch.ops, package.operators)
        self.name = name
        self.abilities, self._has_single = package.abilities, package.has_single
        self._forward = operators.fwd.default
        self._schedule = operators.get_scheduler_metadata.default
        self._forward_defaults = _defaults(self._forward)
        self._schedule_defaults = _defaults(self._schedule)

    def schedule(self, problem: Problem, step: VarlenStep, cache_cols: int) -> Tensor | None:
        """See Provider."""
        if self._takes_single(step):
            return None
        paged = step.block_table is not None
        columns = cache_cols * step.block_table.shape[1] if step.block_table is not None else cache_cols
        made: Tensor = self._schedule(
            **{
                **self._schedule_defaults,
                "batch_size": step.lengths.shape[0],
                "max_seqlen_q": step.max_new,
                "max_seqlen_k": columns,
                "num_heads": problem.num_heads,
                "num_heads_k": problem.num_kv_heads,
                "headdim": problem.head_size,
                "headdim_v": problem.head_size,
                "qkv_dtype": problem.dtype,
                "seqused_k": step.lengths,
                "cu_seqlens_q": step.starts,
                "page_size": cache_cols if paged else None,
                "num_splits": _num_splits(problem, step),
                **_mask(problem, causal=step.causal),
            }
        )
        return made

    def attend(
        self, q: Tensor, cache: tuple[Tensor, Tensor], step: VarlenStep, problem: Problem, out: Tensor | None = None
    ) -> Tensor:
        """See Provider."""
        if step.only is not None and self._takes_single(step):
            return self._attend_single(q, cache, step.only, problem, out)
        return self._run(
            problem,
            causal=step.causal,
            q=q,
            k=cache[0],
            v=cache[1],
            out=out,
            cu_seqlens_q=step.starts,
            seqused_k=step.lengths,
            max_seqlen_q=step.max_new,
            page_table=step.block_table,
            kv_batch_idx=step.rows,
            scheduler_metadata=step.schedule,
            num_splits=_num_splits(problem, step),
        )

    def _takes_single(self, step: VarlenStep) -> bool:
        return self._has_single and step.only is not None and step.max_new >= LONG_CHUNK

    def _attend_single(
        self, q: Tensor, cache: tuple[Tensor, Tensor], home: Home, problem: Problem, out: Tensor | None
    ) -> Tensor:
        """A slot's tokens are a plain tensor: the kernel need not know of batches."""
        keys, values = (x[None, home.slot, : home.length] for x in cache)
        given = None if out is None else out[None]
        return self._run(problem, causal=True, q=q[None], k=keys, v=values, out=given, num_splits=1)[0]

    def _run(self, problem: Problem, *, causal: bool, **given: Any) -> Tensor:
        fixed = {"softmax_scale": problem.scale, **_mask(problem, causal=causal)}
        results: Sequence[Tensor] = self._forward(**{**self._forward_defaults, **fixed, **given})
        return results[0]


def _mask(problem: Problem, *, causal: bool) -> dict[str, Any]:
    left = -1 if problem.window is None else problem.window - 1
    right = 0 if problem.window is not None else -1
    return {"is_causal": causal, "window_size_left": left, "window_size_right": right}


def _num_splits(problem: Problem, step: VarlenStep) -> int:
    """0 lets the library choose, whose choice is made for sequences of one length: chunks among decodes mislead it."""
    return int(step.max_new > 1 and step.lengths.shape[0] * problem.num_kv_heads >= _FILLING)


def _defaults(operator: Any) -> dict[str, Any]:
    """A value for every argument of the schema: its default, or what leaves that feature out."""
    off = {"int": 0, "float": 0.0, "bool": False}
    arguments = operator._schema.arguments
    values = {a.name: a.default_value if a.has_default_value() else off.get(str(a.type)) for a in arguments}
    neutral = {"window_size_left": -1, "window_size_right": -1, "cp_world_size": 1, "num_splits": 0}
    return {**values, **{name: value for name, value in neutral.items() if name in values}}
