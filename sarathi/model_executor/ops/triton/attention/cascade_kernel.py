"""The Triton half of cascade attention: what several sequences share, attended once for all their queries."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sarathi.model_executor.ops.triton.attention.decode_kernel import attend, partner, rotated


@triton.jit
def cascade_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    ranges_ptr,
    members_ptr,
    shared_ptr,
    shared_lse_ptr,
    scale,
    cos_ptr,
    sin_ptr,
    q_stride_seq,
    q_stride_head,
    keys_stride_slot,
    keys_stride_token,
    keys_stride_head,
    values_stride_slot,
    values_stride_token,
    values_stride_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NEW: tl.constexpr,
    PDL: tl.constexpr,
):
    """One range and KV head a program; a range that is not used ends it at once."""
    if PDL:
        gdc_launch_dependents()
    item, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    range_ptr = ranges_ptr + item * 5
    begin, end = tl.load(range_ptr + 1), tl.load(range_ptr + 2)
    if PDL:
        gdc_wait()  # in every program: the kernel behind this one relies on all kernels before it
    if begin < end:
        slot = tl.load(range_ptr).to(tl.int64)
        first, count = tl.load(range_ptr + 3), tl.load(range_ptr + 4)
        rows, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_SIZE)
        present = rows // GROUP < count
        seqs = tl.load(members_ptr + first + rows // GROUP, mask=present, other=0)
        q_rows_ptr = q_ptr + seqs.to(tl.int64) * q_stride_seq + (head * GROUP + rows % GROUP) * q_stride_head
        q = tl.load(q_rows_ptr[:, None] + dims[None, :], mask=present[:, None], other=0.0)
        if NEW:
            positions = tl.load(lengths_ptr + seqs, mask=present, other=1) - 1
            q = _rotated_at(q, q_rows_ptr, positions.to(tl.int64), present, cos_ptr, sin_ptr, HEAD_SIZE)
        peak, sums, acc = attend(
            q,
            keys_ptr + slot * keys_stride_slot + head * keys_stride_head,
            values_ptr + slot * values_stride_slot + head * values_stride_head,
            keys_stride_token,
            values_stride_token,
            begin,
            tl.cdiv(end - begin, TILE),
            end,
            scale,
            TILE,
            0,
        )
        row = tl.program_id(0) * ROWS + rows
        tl.store(shared_ptr + row[:, None] * HEAD_SIZE + dims[None, :], acc / sums[:, None], mask=present[:, None])
        tl.store(shared_lse_ptr + row, peak + tl.log2(sums), mask=present)


@triton.jit
def _rotated_at(q, q_rows_ptr, positions, present, cos_ptr, sin_ptr, HEAD_SIZE: tl.constexpr):
    """Queries [ROWS, HEAD_SIZE], each rotated to its own position."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    dims = tl.arange(0, HEAD_SIZE)[None, :]
    read = present[:, None]
    other = tl.load(q_rows_ptr[:, None] + partner(dims, HEAD_SIZE), mask=read, other=0.0)
    at = positions[:, None] * HALF + dims % HALF
    cos = tl.load(cos_ptr + at, mask=read, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=read, other=0.0).to(tl.float32)
    return rotated(q, other, cos, tl.where(dims < HALF, -sin, sin))
