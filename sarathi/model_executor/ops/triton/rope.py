"""Rotary embedding of queries and keys, and the store of keys and values into a strided cache, in one launch."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sarathi.model_executor.ops.types import CacheTarget, RopeTable

_HEADS = 8  # heads of one program: 2 KiB of bf16, enough that the launch of programs is not what takes the time


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: RopeTable, target: CacheTarget, *, pdl: bool = False
) -> None:
    """See ``NativeOps.rope_and_store``."""
    tokens, q_heads, head_size = q.shape
    if tokens == 0:
        return
    q_groups, kv_groups = triton.cdiv(q_heads, _HEADS), triton.cdiv(k.shape[1], _HEADS)
    options = {"num_warps": 2, **({"launch_pdl": True} if pdl else {})}
    _rope_kernel[(tokens, q_groups + kv_groups)](
        *(q, k, v, positions, *table, *target),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        *(*target.keys.stride()[:3], *target.values.stride()[:3]),
        Q_HEADS=q_heads,
        KV_HEADS=k.shape[1],
        Q_GROUPS=q_groups,
        HEADS=_HEADS,
        HEAD_SIZE=head_size,
        HALF=table.cos.shape[1],
        BLOCK=triton.next_power_of_2(head_size),
        BLOCK_HALF=triton.next_power_of_2(table.cos.shape[1]),
        PDL=pdl,
        **options,
    )


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    rows_ptr,
    cols_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    keys_stride_row,
    keys_stride_col,
    keys_stride_head,
    values_stride_row,
    values_stride_col,
    values_stride_head,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    is_key = group >= Q_GROUPS
    if is_key:
        heads = (group - Q_GROUPS) * HEADS + tl.arange(0, HEADS)
        x_ptr = k_ptr + token * k_stride_token + heads[:, None] * k_stride_head
        present = heads < KV_HEADS
    else:
        heads = group * HEADS + tl.arange(0, HEADS)
        x_ptr = q_ptr + token * q_stride_token + heads[:, None] * q_stride_head
        present = heads < Q_HEADS
    half = tl.arange(0, BLOCK_HALF)
    rotated = half < HALF
    inside = present[:, None] & rotated[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + half, mask=rotated, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * HALF + half, mask=rotated, other=0.0).to(tl.float32)[None, :]
    left = tl.load(x_ptr + half[None, :], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x_ptr + HALF + half[None, :], mask=inside, other=0.0).to(tl.float32)
    new_left = (left * cos - right * sin).to(q_ptr.dtype.element_ty)
    new_right = (right * cos + left * sin).to(q_ptr.dtype.element_ty)
    tl.store(x_ptr + half[None, :], new_left, mask=inside)
    tl.store(x_ptr + HALF + half[None, :], new_right, mask=inside)
    row = tl.load(rows_ptr + token).to(tl.int64)
    if is_key & (row >= 0):
        # 64-bit throughout: a layer of the cache spans far more than 2**31 elements.
        col = tl.load(cols_ptr + token).to(tl.int64)
        key_ptr = keys_ptr + row * keys_stride_row + col * keys_stride_col + heads[:, None] * keys_stride_head
        tl.store(key_ptr + half[None, :], new_left, mask=inside)
        tl.store(key_ptr + HALF + half[None, :], new_right, mask=inside)
        dims = tl.arange(0, BLOCK)[None, :]
        whole = present[:, None] & (dims < HEAD_SIZE)
        if 2 * HALF < HEAD_SIZE:
            unrotated = whole & (dims >= 2 * HALF)
            tl.store(key_ptr + dims, tl.load(x_ptr + dims, mask=unrotated), mask=unrotated)
        value_ptr = values_ptr + row * values_stride_row + col * values_stride_col
        value = tl.load(v_ptr + token * v_stride_token + heads[:, None] * v_stride_head + dims, mask=whole)
        tl.store(value_ptr + heads[:, None] * values_stride_head + dims, value, mask=whole)
