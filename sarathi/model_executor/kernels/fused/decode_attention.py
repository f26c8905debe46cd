"""Decode attention over a contiguous strided cache, split along the tokens. Knows nothing of schedulers or pages.

All tiles of all sequences and heads stand in one line, and a fixed number of programs takes equal shares of it:

    sequence 0            | sequence 1        | ...        tiles of `tile` tokens, grouped by (sequence, kv head)
    h0: t t t  h1: t t t  | h0: t t  h1: t t  | ...
    [program 0][program 1][program 2] ...                  each takes ceil(total / programs) tiles

A (sequence, head) that lies within one program is written to the output at once; one cut by the border of a share is
written in parts, at most two a program (the share's first and last), which a second kernel joins. The grid depends on
nothing but the device, and lengths are read on the device, so a captured graph serves any lengths.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sarathi.model_executor.kernels.types import DecodeBatch

_LOG2_E = 1.4426950408889634
_PADDED_GROUP = 16  # query heads of one kv head, padded to the short side of the tensor cores' instruction


class DecodeConfig(NamedTuple):
    """Shape of the work; the defaults are for an H200."""

    tile: int = 64  # tokens read at a time
    programs_per_sm: int = 2
    warps: int = 4
    stages: int = 3


class DecodeWorkspace(NamedTuple):
    """Where parts of a sequence wait to be joined. One serves all layers, and all graphs on one stream."""

    parts: Tensor  # [programs, 2, _PADDED_GROUP, head_size] float32, not divided by their sums
    peaks: Tensor  # [programs, 2, _PADDED_GROUP] float32, largest score in units of log2
    sums: Tensor  # [programs, 2, _PADDED_GROUP] float32
    config: DecodeConfig

    @classmethod
    def create(
        cls, num_sms: int, head_size: int, device: torch.device, config: DecodeConfig | None = None
    ) -> "DecodeWorkspace":
        """Scratch for a device of `num_sms` multiprocessors: about 4 MiB for an H200 and head size 128."""
        config = config or DecodeConfig()
        shape = (num_sms * config.programs_per_sm, 2, _PADDED_GROUP)
        parts = torch.empty((*shape, head_size), dtype=torch.float32, device=device)
        peaks, sums = torch.empty((2, *shape), dtype=torch.float32, device=device)
        return cls(parts, peaks, sums, config)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: DecodeBatch,
    scale: float,
    workspace: DecodeWorkspace,
    *,
    pdl: bool = False,
) -> Tensor:
    """See ``reference.decode_attention``. Any slot, token and head strides; at most 16 query heads to a kv head.

    head_size: a power of two. Returns a contiguous tensor like q.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_seqs, heads, head_size = q.shape
    if num_seqs == 0:
        return out
    config, kv_heads = workspace.config, keys.shape[2]
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "PADDED": _PADDED_GROUP,
        "HEAD_SIZE": head_size,
        "TILE": config.tile,
        "SEQS": _padded(num_seqs),
        "WINDOW": batch.window or 0,
        "PDL": pdl,
        **({"launch_pdl": True} if pdl else {}),
    }
    scratch = (workspace.parts, workspace.peaks, workspace.sums)
    programs = workspace.parts.shape[0]
    strides = (*q.stride()[:2], *keys.stride()[:3], *values.stride()[:3])
    _share_kernel[(programs,)](
        *(q, keys, values, batch.slots, batch.lengths, out, *scratch, scale * _LOG2_E, num_seqs, *strides),
        **shape,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    _join_kernel[(num_seqs * kv_heads, heads // kv_heads)](
        *(batch.lengths, out, *scratch, num_seqs, programs), **shape, PARTS=16, num_warps=4
    )
    return out


def _padded(num_seqs: int) -> int:
    """16, 64, 256, ...: few enough sizes that a ladder of batch sizes shares its compiled kernels."""
    padded = 16
    while padded < num_seqs:
        padded *= 4
    return padded


@triton.jit
def _tiles_of(lengths, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """(first tile, number of tiles) of sequences of these lengths."""
    first = lengths * 0
    if WINDOW > 0:
        first = tl.maximum(lengths - WINDOW, 0) // TILE
    return first, tl.cdiv(lengths, TILE) - first


@triton.jit(do_not_specialize=["num_seqs"])
def _share_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    lengths_ptr,
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    scale,
    num_seqs,
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
    PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEQS: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    seqs = tl.arange(0, SEQS)
    lengths = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
    tiles_of = _tiles_of(lengths, TILE, WINDOW)[1]
    ends = tl.cumsum(tiles_of * KV_HEADS, axis=0)
    total = tl.sum(tiles_of * KV_HEADS, axis=0)
    share = tl.cdiv(total, tl.num_programs(0))
    begin = program * share
    end = tl.minimum(begin + share, total)

    group = tl.arange(0, PADDED)
    dims = tl.arange(0, HEAD_SIZE)
    tokens = tl.arange(0, TILE)
    present = group < GROUP
    key_offsets = tokens[:, None] * keys_stride_token + dims[None, :]
    value_offsets = tokens[:, None] * values_stride_token + dims[None, :]
    at = begin
    while at < end:
        seq = tl.sum((ends <= at).to(tl.int32), axis=0)
        length = tl.load(lengths_ptr + seq)
        first, tiles = _tiles_of(length, TILE, WINDOW)
        seq_begin = tl.sum(tl.where(seqs == seq, ends, 0), axis=0) - tiles * KV_HEADS
        head = (at - seq_begin) // tiles
        head_begin = seq_begin + head * tiles
        stop = tl.minimum(head_begin + tiles, end)

        slot = tl.load(slots_ptr + seq).to(tl.int64)
        heads = head * GROUP + group
        q_offsets = seq.to(tl.int64) * q_stride_seq + heads[:, None] * q_stride_head + dims[None, :]
        q = tl.load(q_ptr + q_offsets, mask=present[:, None], other=0.0)
        # 64-bit from the start: one slot of a megacache alone spans more than 2**31 elements.
        start = (first + at - head_begin).to(tl.int64) * TILE
        key_ptr = keys_ptr + slot * keys_stride_slot + head * keys_stride_head + start * keys_stride_token
        value_ptr = values_ptr + slot * values_stride_slot + head * values_stride_head + start * values_stride_token
        token = start.to(tl.int32) + tokens
        peak = tl.full((PADDED,), float("-inf"), tl.float32)
        sums = tl.zeros((PADDED, TILE), tl.float32)
        acc = tl.zeros((PADDED, HEAD_SIZE), tl.float32)
        for _tile in range(at, stop):
            # Past the length lie other requests' numbers, NaN, or no memory at all: never read.
            inside = token < length
            keys = tl.load(key_ptr + key_offsets, mask=inside[:, None], other=0.0)
            values = tl.load(value_ptr + value_offsets, mask=inside[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(keys)) * scale
            seen = inside
            if WINDOW > 0:
                seen = inside & (token >= length - WINDOW)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            sums = sums * shrink[:, None] + weights
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(values.dtype), values, acc)
            peak = new_peak
            key_ptr += TILE * keys_stride_token
            value_ptr += TILE * values_stride_token
            token += TILE

        sum_ = tl.sum(sums, axis=1)
        if (at == head_begin) & (stop == head_begin + tiles):
            out_rows = seq.to(tl.int64) * (KV_HEADS * GROUP) + heads
            tl.store(
                out_ptr + out_rows[:, None] * HEAD_SIZE + dims[None, :],
                (acc / sum_[:, None]).to(out_ptr.dtype.element_ty),
                mask=present[:, None],
            )
        else:
            row = (program * 2 + (at > begin).to(tl.int32)) * PADDED + group
            tl.store(parts_ptr + row[:, None] * HEAD_SIZE + dims[None, :], acc, mask=present[:, None])
            tl.store(peaks_ptr + row, peak, mask=present)
            tl.store(sums_ptr + row, sum_, mask=present)
        at = stop


@triton.jit(do_not_specialize=["num_seqs"])
def _join_kernel(
    lengths_ptr,
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    num_seqs,
    programs,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEQS: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
    PARTS: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    seq, head, member = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    seqs = tl.arange(0, SEQS)
    lengths = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
    tiles_of = _tiles_of(lengths, TILE, WINDOW)[1]
    share = tl.maximum(tl.cdiv(tl.sum(tiles_of, axis=0) * KV_HEADS, programs), 1)
    before = tl.sum(tl.where(seqs < seq, tiles_of, 0), axis=0)
    tiles = tl.sum(tl.where(seqs == seq, tiles_of, 0), axis=0)
    begin = before * KV_HEADS + head * tiles
    first, last = begin // share, (begin + tiles - 1) // share
    dims = tl.arange(0, HEAD_SIZE)
    out_row = (seq.to(tl.int64) * KV_HEADS + head) * GROUP + member
    if tiles == 0:
        tl.store(out_ptr + out_row * HEAD_SIZE + dims, tl.zeros((HEAD_SIZE,), out_ptr.dtype.element_ty))
    elif first < last:
        peak = float("-inf")
        total = 0.0
        acc = tl.zeros((HEAD_SIZE,), tl.float32)
        for start in range(first, last + 1, PARTS):
            program = start + tl.arange(0, PARTS)
            inside = program <= last
            # A program's first part is its slot 0; a head that begins inside the share is its last part, slot 1.
            row = (program * 2 + (program * share < begin).to(tl.int32)) * PADDED + member
            peaks = tl.load(peaks_ptr + row, mask=inside, other=float("-inf"))
            sums = tl.load(sums_ptr + row, mask=inside, other=0.0)
            parts = tl.load(parts_ptr + row[:, None] * HEAD_SIZE + dims[None, :], mask=inside[:, None], other=0.0)
            new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
            weights = tl.exp2(peaks - new_peak)
            shrink = tl.exp2(peak - new_peak)
            acc = acc * shrink + tl.sum(parts * weights[:, None], axis=0)
            total = total * shrink + tl.sum(sums * weights, axis=0)
            peak = new_peak
        tl.store(out_ptr + out_row * HEAD_SIZE + dims, (acc / total).to(out_ptr.dtype.element_ty))
