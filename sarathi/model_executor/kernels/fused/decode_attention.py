"""Decode attention over a contiguous strided cache, split along the tokens. Knows nothing of schedulers or pages.

All tiles of all sequences and heads stand in one line, and a fixed number of programs takes equal shares of it:

    sequence 0            | sequence 1        | ...        tiles of `tile` tokens, grouped by (sequence, kv head)
    h0: t t t  h1: t t t  | h0: t t  h1: t t  | ...
    [program 0][program 1][program 2] ...                  each takes ceil(total / programs) tiles

A run, the tiles of one (sequence, head), that lies within one program is written to the output at once. One cut by the
border of a share is written in parts, at most two a program (the share's first and last), and the program that is done
with its part last joins them, in the order of the parts, so that results do not depend on timing. The grid depends on
nothing but the device, and lengths are read on the device, so a captured graph serves any lengths.

Where the step's keys and values are handed over too, the program that has a run's last tile turns and stores them.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sarathi.model_executor.kernels.types import DecodeBatch, NewTokens, RotationTable

_LOG2_E = 1.4426950408889634
_PADDED_GROUP = 16  # query heads of one kv head, padded to the short side of the tensor cores' instruction
_JOINED_ROWS = 64  # rows of parts, each of one query head, that are read at a time when a run is joined
_FEW_TILES = tl.constexpr(16)  # a program's share up to which half as many programs are faster: fewer parts to join


class DecodeConfig(NamedTuple):
    """Shape of the work; the defaults are for an H200."""

    tile: int = 64  # tokens read at a time
    programs_per_sm: int = 2
    warps: int = 4
    stages: int = 3


class DecodeWorkspace(NamedTuple):
    """Where parts of a run wait to be joined. One serves all layers, and all graphs on one stream."""

    parts: Tensor  # [programs, 2, _PADDED_GROUP, head_size] float32, not divided by their sums
    peaks: Tensor  # [programs, 2, _PADDED_GROUP] float32, largest score in units of log2
    sums: Tensor  # [programs, 2, _PADDED_GROUP] float32
    arrivals: Tensor  # [programs] int32: parts done of the run that is cut by the program's end; 0 between launches
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
        return cls(parts, peaks, sums, torch.zeros(shape[0], dtype=torch.int32, device=device), config)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: DecodeBatch,
    scale: float,
    workspace: DecodeWorkspace,
    new: NewTokens | None = None,
    *,
    pdl: bool = False,
) -> Tensor:
    """See ``reference.decode_attention``. Any slot, token and head strides; at most 16 query heads to a kv head.

    head_size: a power of two. new: None where q is turned and the cache holds the step's keys and values already.
    Returns a contiguous tensor like q.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_seqs, heads, head_size = q.shape
    if num_seqs == 0:
        return out
    config, kv_heads = workspace.config, keys.shape[2]
    members = triton.next_power_of_2(heads // kv_heads)
    fresh = new or NewTokens(q, q, RotationTable(q, q))
    _attention_kernel[(workspace.parts.shape[0],)](
        *(q, keys, values, batch.slots, batch.lengths, out, *workspace[:4], scale * _LOG2_E, num_seqs),
        *(fresh.keys, fresh.values, *fresh.table),
        *(
            *q.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            *fresh.keys.stride()[:2],
            *fresh.values.stride()[:2],
        ),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        PADDED=_PADDED_GROUP,
        MEMBERS=members,
        HEAD_SIZE=head_size,
        TILE=config.tile,
        SEQS=_padded(num_seqs),
        WINDOW=batch.window or 0,
        PARTS=_JOINED_ROWS // members,
        NEW=new is not None,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        **({"launch_pdl": True} if pdl else {}),
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


@triton.jit
def _turned(left, right, cos, sin):
    """The halves of a head, turned; rounded as a store between would have."""
    wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
    new_left = (wide_left * cos - wide_right * sin).to(left.dtype)
    return new_left, (wide_right * cos + wide_left * sin).to(left.dtype)


@triton.jit
def _turned_queries(q_ptr, heads, stride_head, present, cos, sin, HEAD_SIZE: tl.constexpr):
    """Query heads [PADDED, HEAD_SIZE], turned: the halves are put one behind the other again."""
    half = tl.arange(0, HEAD_SIZE // 2)
    at = q_ptr + heads[:, None] * stride_head + half[None, :]
    left = tl.load(at, mask=present[:, None], other=0.0)
    right = tl.load(at + HEAD_SIZE // 2, mask=present[:, None], other=0.0)
    left, right = _turned(left, right, cos[None, :], sin[None, :])
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (heads.shape[0], HEAD_SIZE))


@triton.jit
def _store_new(new_key_ptr, new_value_ptr, key_ptr, value_ptr, cos, sin, HEAD_SIZE: tl.constexpr):
    """One head of the step's key, turned, and of its value go to their place in the cache."""
    half, dims = tl.arange(0, HEAD_SIZE // 2), tl.arange(0, HEAD_SIZE)
    left, right = _turned(tl.load(new_key_ptr + half), tl.load(new_key_ptr + HEAD_SIZE // 2 + half), cos, sin)
    tl.store(key_ptr + half, left)
    tl.store(key_ptr + HEAD_SIZE // 2 + half, right)
    tl.store(value_ptr + dims, tl.load(new_value_ptr + dims))


@triton.jit(do_not_specialize=["num_seqs"])
def _attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    lengths_ptr,
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    arrivals_ptr,
    scale,
    num_seqs,
    new_keys_ptr,
    new_values_ptr,
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
    new_keys_stride_seq,
    new_keys_stride_head,
    new_values_stride_seq,
    new_values_stride_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEQS: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    NEW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    seqs = tl.arange(0, SEQS)
    lengths = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
    tiles_of = _tiles_of(lengths, TILE, WINDOW)[1]
    ends = tl.cumsum(tiles_of * KV_HEADS, axis=0)
    total = tl.sum(tiles_of * KV_HEADS, axis=0)
    programs = tl.num_programs(0)
    if total <= programs * _FEW_TILES:
        programs = tl.cdiv(programs, 2)  # the others find nothing to do
    share = tl.maximum(tl.cdiv(total, programs), 1)
    begin = program * share
    end = tl.minimum(begin + share, total)

    group = tl.arange(0, PADDED)
    dims = tl.arange(0, HEAD_SIZE)
    half = tl.arange(0, HEAD_SIZE // 2)
    tokens = tl.arange(0, TILE)
    present = group < GROUP
    key_offsets = tokens[:, None] * keys_stride_token + dims[None, :]
    value_offsets = tokens[:, None] * values_stride_token + dims[None, :]
    if PDL:
        gdc_wait()
    _clear_padding(out_ptr, lengths_ptr, num_seqs, KV_HEADS * GROUP, HEAD_SIZE)
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
        wide_seq = seq.to(tl.int64)
        heads = head * GROUP + group
        # 64-bit from the start: one slot of a megacache alone spans more than 2**31 elements.
        head_keys_ptr = keys_ptr + slot * keys_stride_slot + head * keys_stride_head
        head_values_ptr = values_ptr + slot * values_stride_slot + head * values_stride_head
        if NEW:
            position = (length - 1).to(tl.int64)
            cos = tl.load(cos_ptr + position * (HEAD_SIZE // 2) + half).to(tl.float32)
            sin = tl.load(sin_ptr + position * (HEAD_SIZE // 2) + half).to(tl.float32)
            q = _turned_queries(q_ptr + wide_seq * q_stride_seq, heads, q_stride_head, present, cos, sin, HEAD_SIZE)
            if stop == head_begin + tiles:
                _store_new(
                    new_keys_ptr + wide_seq * new_keys_stride_seq + head * new_keys_stride_head,
                    new_values_ptr + wide_seq * new_values_stride_seq + head * new_values_stride_head,
                    head_keys_ptr + position * keys_stride_token,
                    head_values_ptr + position * values_stride_token,
                    cos,
                    sin,
                    HEAD_SIZE,
                )
                tl.debug_barrier()  # the loop below reads them, by other threads of this program
        else:
            q_offsets = wide_seq * q_stride_seq + heads[:, None] * q_stride_head + dims[None, :]
            q = tl.load(q_ptr + q_offsets, mask=present[:, None], other=0.0)
        start = (first + at - head_begin).to(tl.int64) * TILE
        key_ptr = head_keys_ptr + start * keys_stride_token
        value_ptr = head_values_ptr + start * values_stride_token
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
        out_rows = wide_seq * (KV_HEADS * GROUP) + heads
        if (at == head_begin) & (stop == head_begin + tiles):
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
            first_program, last_program = head_begin // share, (head_begin + tiles - 1) // share
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                tl.store(arrivals_ptr + first_program, 0)
                # A program's first part is its slot 0; a head that begins inside the share is its last part, slot 1.
                begins_inside = first_program * share < head_begin
                _join(
                    out_ptr + (wide_seq * KV_HEADS + head) * (GROUP * HEAD_SIZE),
                    parts_ptr,
                    peaks_ptr,
                    sums_ptr,
                    first_program,
                    last_program,
                    begins_inside,
                    GROUP,
                    PADDED,
                    MEMBERS,
                    HEAD_SIZE,
                    PARTS,
                )
        at = stop


@triton.jit
def _clear_padding(out_ptr, lengths_ptr, num_seqs, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Rows of length 0 have no tiles, and so nobody else to write them."""
    dims = tl.arange(0, HEAD_SIZE)
    for seq in range(tl.program_id(0), num_seqs, tl.num_programs(0)):
        if tl.load(lengths_ptr + seq) == 0:
            for head in range(HEADS):
                row = seq * HEADS + head
                tl.store(out_ptr + row * HEAD_SIZE + dims, tl.zeros((HEAD_SIZE,), out_ptr.dtype.element_ty))


@triton.jit
def _join(
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    first_program,
    last_program,
    begins_inside,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A run from its parts, of programs first to last, past L1, which may hold what an earlier launch left there."""
    member, dims = tl.arange(0, MEMBERS), tl.arange(0, HEAD_SIZE)
    present = member < GROUP
    peak = tl.full((MEMBERS,), float("-inf"), tl.float32)
    total = tl.zeros((MEMBERS,), tl.float32)
    acc = tl.zeros((MEMBERS, HEAD_SIZE), tl.float32)
    for start in range(first_program, last_program + 1, PARTS):
        program = start + tl.arange(0, PARTS)
        place = program * 2 + ((program == first_program) & begins_inside).to(tl.int32)
        row = place[:, None] * PADDED + member[None, :]
        read = (program <= last_program)[:, None] & present[None, :]
        peaks = tl.load(peaks_ptr + row, mask=read, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(sums_ptr + row, mask=read, other=0.0, cache_modifier=".cg")
        part_ptr = parts_ptr + row[:, :, None] * HEAD_SIZE + dims[None, None, :]
        parts = tl.load(part_ptr, mask=read[:, :, None], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
        safe_peak = tl.where(present, new_peak, 0.0)
        weights = tl.exp2(peaks - safe_peak[None, :])
        shrink = tl.exp2(peak - safe_peak)
        acc = acc * shrink[:, None] + tl.sum(parts * weights[:, :, None], axis=0)
        total = total * shrink + tl.sum(sums * weights, axis=0)
        peak = new_peak
    at = member[:, None] * HEAD_SIZE + dims[None, :]
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=present[:, None])
