"""Matrix product for a handful of tokens (2 to 16): weights stream through the tensor cores once, with the gated
activation or the addition to the residual after it. Knows nothing of layers.

The weight tile takes the long side of the instruction and the tokens the short one. Where there are too few tiles to
fill the device the inner dimension is split; the program that arrives last adds the parts in a fixed order, so results
do not depend on timing.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sarathi.model_executor.ops.triton.matvec import Epilogue

MAX_TOKENS = 16
MAX_TILES = 8192  # counters a workspace must hold: one for each tile of output rows


class SkinnyConfig(NamedTuple):
    """Shape of one program and the number of parts of the inner dimension."""

    block_n: int = 64
    block_k: int = 128
    splits: int = 1
    stages: int = 4
    warps: int = 4


def skinny(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    epilogue: Epilogue,
    config: SkinnyConfig,
    counters: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """``out = epilogue(x @ weight.T)`` for up to 16 tokens.

    x: [num_tokens, in], last stride 1; weight: [out or 2 * out, in], last stride 1, ``in`` a multiple of
    config.block_k; out: [num_tokens, out], contiguous; counters: [MAX_TILES] int32, zero, and zero again afterwards.
    """
    tokens, size = x.shape
    tiles = triton.cdiv(out.shape[1], config.block_n)
    parts = 2 if epilogue.gated else 1
    partial = torch.empty(
        (tiles * config.splits * parts, config.block_n, MAX_TOKENS) if config.splits > 1 else (1,),
        dtype=torch.float32,
        device=x.device,
    )
    options = {"num_warps": config.warps, "num_stages": config.stages, **({"launch_pdl": True} if pdl else {})}
    _skinny_kernel[(tiles, config.splits)](
        *(x, weight, out, *epilogue.pointers(x), partial, counters),
        *(tokens, out.shape[1], size, x.stride(0), weight.stride(0)),
        BLOCK_M=MAX_TOKENS,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        PDL=pdl,
        **epilogue.flags,
        **options,
    )


@triton.jit(do_not_specialize=["tokens"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    partial_ptr,
    counters_ptr,
    tokens,
    outputs,
    size,
    stride_x,
    stride_weight,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(1)
    blocks = size // BLOCK_K
    first, last = (split * blocks) // SPLITS, ((split + 1) * blocks) // SPLITS
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    near = tl.minimum(rows, outputs - 1).to(tl.int64)  # rows past the end repeat the last one and are not stored
    cols = first * BLOCK_K + tl.arange(0, BLOCK_K)
    gate_ptr = weight_ptr + near[:, None] * stride_weight + cols[None, :]
    up_ptr = gate_ptr + outputs.to(tl.int64) * stride_weight
    token_ptr = x_ptr + tl.minimum(token, tokens - 1)[None, :] * stride_x + cols[:, None]
    if PDL:
        gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(first, last):
        x = tl.load(token_ptr)
        total = tl.dot(tl.load(gate_ptr, eviction_policy="evict_first"), x, total)
        if GATED:
            up_total = tl.dot(tl.load(up_ptr, eviction_policy="evict_first"), x, up_total)
            up_ptr += BLOCK_K
        gate_ptr += BLOCK_K
        token_ptr += BLOCK_K
    is_last = True
    if SPLITS > 1:
        PARTS: tl.constexpr = 2 if GATED else 1
        AREA: tl.constexpr = BLOCK_N * BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + token[None, :]
        tile_ptr = partial_ptr + tile.to(tl.int64) * (SPLITS * PARTS * AREA) + at
        tl.store(tile_ptr + split * PARTS * AREA, total)
        if GATED:
            tl.store(tile_ptr + (split * PARTS + 1) * AREA, up_total)
        tl.debug_barrier()
        is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            up_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(tile_ptr + part * PARTS * AREA, cache_modifier=".cg")
                if GATED:
                    up_total += tl.load(tile_ptr + (part * PARTS + 1) * AREA, cache_modifier=".cg")
            tl.store(counters_ptr + tile, 0)
    if is_last:
        stored = (rows < outputs)[:, None] & (token < tokens)[None, :]
        at_out = token[None, :].to(tl.int64) * outputs + rows[:, None]
        result = total
        if GATED:
            result = total * tl.sigmoid(total) * up_total
        if BIAS:
            result += tl.load(bias_ptr + rows, mask=rows < outputs, other=0.0).to(tl.float32)[:, None]
        if ADD:
            result += tl.load(residual_ptr + at_out, mask=stored, other=0.0).to(tl.float32)
        tl.store(out_ptr + at_out, result.to(out_ptr.dtype.element_ty), mask=stored)
