"""The Triton half of decode attention, whose other half says how the work is divided. Knows pointers, no tensors."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _extent_of(lengths, KV_HEADS: tl.constexpr, TILE: tl.constexpr, RUN_COST: tl.constexpr, WINDOW: tl.constexpr):
    """(first tile, number of tiles, places of the line that all runs take) of sequences of these lengths."""
    first = lengths * 0
    if WINDOW > 0:
        first = tl.maximum(lengths - WINDOW, 0) // TILE
    tiles = tl.cdiv(lengths, TILE) - first
    return first, tiles, tl.where(tiles > 0, (tiles + RUN_COST) * KV_HEADS, 0)


@triton.jit
def _sequence_at(
    at, ends, lengths_ptr, sequences_ptr, KV_HEADS: tl.constexpr, TILE: tl.constexpr, RUN_COST: tl.constexpr,
    SEQS: tl.constexpr, WINDOW: tl.constexpr, CASCADE: tl.constexpr,
):  # fmt: skip
    """Number, length, first token, number of tiles, first place and the place behind the sequence at a place."""
    seq = tl.sum((ends <= at).to(tl.int32), axis=0)
    length = tl.load(lengths_ptr + seq)
    shared = length * 0
    if CASCADE:
        shared = tl.load(sequences_ptr + seq * 4)
    first, tiles, places = _extent_of(length - shared, KV_HEADS, TILE, RUN_COST, WINDOW)
    end = tl.sum(tl.where(tl.arange(0, SEQS) == seq, ends, 0), axis=0)
    return seq, length, shared + first * TILE, tiles, end - places, end


@triton.jit
def _ask_for(row_ptrs, SIZE: tl.constexpr):
    """Has rows of SIZE elements brought to L2 without waiting for them."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [row_ptrs.to(tl.int64), SIZE * row_ptrs.dtype.element_ty.primitive_bitwidth // 8],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def rotated(own, other, cos, sin):
    """Dimensions of a head, rotated with those of its other half; rounded as a store between would have."""
    return (own.to(tl.float32) * cos + other.to(tl.float32) * sin).to(own.dtype)


@triton.jit
def _angle(cos_ptr, sin_ptr, position, HEAD_SIZE: tl.constexpr):
    """What a dimension and its partner count for at a position: [HEAD_SIZE] float32 each."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    dims = tl.arange(0, HEAD_SIZE)
    at = position * HALF + dims % HALF
    sin = tl.load(sin_ptr + at).to(tl.float32)
    return tl.load(cos_ptr + at).to(tl.float32), tl.where(dims < HALF, -sin, sin)


@triton.jit
def _rotated_queries(q_ptr, heads, stride_head, present, cos, sin, HEAD_SIZE: tl.constexpr):
    """Query heads [PADDED, HEAD_SIZE], rotated.

    Read twice, since halves put together by tl.join would have the product's operands laid out four elements at a time,
    as ldmatrix cannot read them.
    """
    dims = tl.arange(0, HEAD_SIZE)
    rows_ptr, read = q_ptr + heads[:, None] * stride_head, present[:, None]
    own = tl.load(rows_ptr + dims[None, :], mask=read, other=0.0)
    other = tl.load(rows_ptr + partner(dims, HEAD_SIZE)[None, :], mask=read, other=0.0)
    return rotated(own, other, cos[None, :], sin[None, :])


@triton.jit
def _store_new(new_key_ptr, new_value_ptr, key_ptr, value_ptr, cos, sin, HEAD_SIZE: tl.constexpr):
    """One head of the step's key, rotated, and of its value go to their place in the cache."""
    dims = tl.arange(0, HEAD_SIZE)
    key = rotated(tl.load(new_key_ptr + dims), tl.load(new_key_ptr + partner(dims, HEAD_SIZE)), cos, sin)
    tl.store(key_ptr + dims, key)
    tl.store(value_ptr + dims, tl.load(new_value_ptr + dims))


@triton.jit
def partner(dims, HEAD_SIZE: tl.constexpr):
    """The dimension of the other half that each is rotated with."""
    return (dims + HEAD_SIZE // 2) % HEAD_SIZE


@triton.jit(do_not_specialize=["num_seqs"])
def attention_kernel(
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
    sequences_ptr,
    shared_ptr,
    shared_lse_ptr,
    scale,
    num_seqs,
    range_rows,
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
    PARTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SEQS: tl.constexpr,
    WINDOW: tl.constexpr,
    AHEAD: tl.constexpr,
    RUN_COST: tl.constexpr,
    CASCADE: tl.constexpr,
    NEW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    seqs = tl.arange(0, SEQS)
    own = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
    if CASCADE:
        own -= tl.load(sequences_ptr + seqs * 4, mask=seqs < num_seqs, other=0)
    places = _extent_of(own, KV_HEADS, TILE, RUN_COST, WINDOW)[2]
    ends = tl.cumsum(places, axis=0)
    total = tl.sum(places, axis=0)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), 1)
    begin = program * share
    end = tl.minimum(begin + share, total)

    group = tl.arange(0, PADDED)
    dims = tl.arange(0, HEAD_SIZE)
    present = group < GROUP
    if PDL:
        if AHEAD > 0 and begin < end:
            # What was cached before this step is there already, and so are lengths and slots.
            seq, length, first, tiles, seq_begin, _ = _sequence_at(
                begin, ends, lengths_ptr, sequences_ptr, KV_HEADS, TILE, RUN_COST, SEQS, WINDOW, CASCADE
            )
            slot = tl.load(slots_ptr + seq).to(tl.int64)
            head = (begin - seq_begin) // (tiles + RUN_COST)
            tile = tl.maximum((begin - seq_begin) % (tiles + RUN_COST) - RUN_COST, 0)
            rows = tl.minimum(first + tile * TILE + tl.arange(0, AHEAD), length - 1).to(tl.int64)
            head_keys_ptr = keys_ptr + slot * keys_stride_slot + head * keys_stride_head
            head_values_ptr = values_ptr + slot * values_stride_slot + head * values_stride_head
            _ask_for(head_keys_ptr + rows * keys_stride_token, HEAD_SIZE)
            _ask_for(head_values_ptr + rows * values_stride_token, HEAD_SIZE)
        gdc_wait()
    _clear_padding(out_ptr, lengths_ptr, num_seqs, KV_HEADS * GROUP, HEAD_SIZE)
    at = begin
    while at < end:
        seq, length, first, tiles, seq_begin, seq_end = _sequence_at(
            at, ends, lengths_ptr, sequences_ptr, KV_HEADS, TILE, RUN_COST, SEQS, WINDOW, CASCADE
        )
        slot = tl.load(slots_ptr + seq).to(tl.int64)
        wide_seq = seq.to(tl.int64)
        # 64-bit from the start: one slot of a megacache alone spans more than 2**31 elements.
        seq_keys_ptr = keys_ptr + slot * keys_stride_slot
        seq_values_ptr = values_ptr + slot * values_stride_slot
        if NEW:
            position = (length - 1).to(tl.int64)
            cos, sin = _angle(cos_ptr, sin_ptr, position, HEAD_SIZE)
        seq_end = tl.minimum(seq_end, end)
        while at < seq_end:
            head = (at - seq_begin) // (tiles + RUN_COST)
            head_begin = seq_begin + head * (tiles + RUN_COST) + RUN_COST
            at = tl.maximum(at, head_begin)
            stop = tl.minimum(head_begin + tiles, end)
            if at < stop:
                heads = head * GROUP + group
                head_keys_ptr = seq_keys_ptr + head * keys_stride_head
                head_values_ptr = seq_values_ptr + head * values_stride_head
                if NEW:
                    q = _rotated_queries(
                        q_ptr + wide_seq * q_stride_seq, heads, q_stride_head, present, cos, sin, HEAD_SIZE
                    )
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
                peak, sum_, acc = attend(
                    q,
                    head_keys_ptr,
                    head_values_ptr,
                    keys_stride_token,
                    values_stride_token,
                    first + (at - head_begin) * TILE,
                    stop - at,
                    length,
                    scale,
                    TILE,
                    WINDOW,
                )
                out_rows = wide_seq * (KV_HEADS * GROUP) + heads
                shared_row, num_shared = 0, 0
                if CASCADE:
                    shared_row, num_shared = _shared_rows(sequences_ptr + seq * 4, head, KV_HEADS, GROUP, range_rows)
                if (at == head_begin) & (stop == head_begin + tiles):
                    if CASCADE:
                        acc, sum_ = _joined_whole(
                            acc,
                            peak,
                            sum_,
                            shared_ptr,
                            shared_lse_ptr,
                            shared_row,
                            num_shared,
                            GROUP,
                            KV_HEADS * range_rows,
                        )
                    tl.store(
                        out_ptr + out_rows[:, None] * HEAD_SIZE + dims[None, :],
                        (acc / sum_[:, None]).to(out_ptr.dtype.element_ty),
                        mask=present[:, None],
                    )
                else:
                    _leave_part(
                        out_ptr + (wide_seq * KV_HEADS + head) * (GROUP * HEAD_SIZE),
                        parts_ptr,
                        peaks_ptr,
                        sums_ptr,
                        arrivals_ptr,
                        shared_ptr,
                        shared_lse_ptr,
                        shared_row,
                        num_shared,
                        acc,
                        peak,
                        sum_,
                        program * 2 + (at > begin).to(tl.int32),
                        head_begin,
                        head_begin + tiles,
                        share,
                        GROUP,
                        PADDED,
                        MEMBERS,
                        PARTS,
                        HEAD_SIZE,
                        KV_HEADS * range_rows,
                        CASCADE,
                    )
            at = stop


@triton.jit
def attend(
    q,
    keys_ptr,
    values_ptr,
    keys_stride_token,
    values_stride_token,
    first_token,
    tiles,
    length,
    scale,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Queries [N, HEAD_SIZE] over some tiles of one head: largest scores, sums of weights, weighted values.

    The tiles begin with first_token; nothing at or past `length` is read.
    """
    tokens, dims = tl.arange(0, TILE), tl.arange(0, q.shape[1])
    key_offsets = tokens[:, None] * keys_stride_token + dims[None, :]
    value_offsets = tokens[:, None] * values_stride_token + dims[None, :]
    start = first_token.to(tl.int64)
    key_ptr = keys_ptr + start * keys_stride_token
    value_ptr = values_ptr + start * values_stride_token
    token = start.to(tl.int32) + tokens
    peak = tl.full((q.shape[0],), float("-inf"), tl.float32)
    # Of few queries by place in the tile, so that the loop needs no exchange between threads for them.
    sums = tl.zeros((q.shape[0], TILE if q.shape[0] <= 16 else 1), tl.float32)
    acc = tl.zeros((q.shape[0], q.shape[1]), tl.float32)
    for _tile in range(tiles):
        # Past the length lie other requests' numbers, NaN, or no memory at all: never read.
        inside = token < length
        keys = tl.load(key_ptr + key_offsets, mask=inside[:, None], other=0.0)
        values = tl.load(value_ptr + value_offsets, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys))
        seen = inside
        if WINDOW > 0:
            seen = inside & (token >= length - WINDOW)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        sums = sums * shrink[:, None] + (weights if q.shape[0] <= 16 else tl.sum(weights, axis=1, keep_dims=True))
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc)
        peak = new_peak
        key_ptr += TILE * keys_stride_token
        value_ptr += TILE * values_stride_token
        token += TILE
    return peak, tl.sum(sums, axis=1), acc


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
def _leave_part(
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    arrivals_ptr,
    shared_ptr,
    shared_lse_ptr,
    shared_row,
    num_shared,
    acc,
    peak,
    sum_,
    place,
    run_begin,
    run_end,
    share,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    shared_step,
    CASCADE: tl.constexpr,
):
    """A part of a run goes to its place to be joined with the others, by the program whose part is there last."""
    group, dims = tl.arange(0, PADDED), tl.arange(0, HEAD_SIZE)
    present = group < GROUP
    row = place * PADDED + group
    tl.store(parts_ptr + row[:, None] * HEAD_SIZE + dims[None, :], acc, mask=present[:, None])
    tl.store(peaks_ptr + row, peak, mask=present)
    tl.store(sums_ptr + row, sum_, mask=present)
    first_program, last_program = run_begin // share, (run_end - 1) // share
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel")
    if arrived == last_program - first_program:
        tl.store(arrivals_ptr + first_program, 0)
        _join(
            out_ptr,
            parts_ptr,
            peaks_ptr,
            sums_ptr,
            shared_ptr,
            shared_lse_ptr,
            shared_row,
            num_shared,
            first_program,
            last_program,
            first_program * share < run_begin,
            GROUP,
            PADDED,
            MEMBERS,
            PARTS,
            HEAD_SIZE,
            shared_step,
            CASCADE,
        )


@triton.jit
def _join(
    out_ptr,
    parts_ptr,
    peaks_ptr,
    sums_ptr,
    shared_ptr,
    shared_lse_ptr,
    shared_row,
    num_shared,
    first_program,
    last_program,
    begins_inside,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    shared_step,
    CASCADE: tl.constexpr,
):
    """A run from its parts, of programs first to last, past L1, which may hold what an earlier launch left there.

    PARTS at a time, whose reads need nothing of each other nor of other threads, so that all wait for memory at once:
    what stands beside a part is [MEMBERS, 1], laid out as the part itself.
    """
    member, dims = tl.arange(0, MEMBERS), tl.arange(0, HEAD_SIZE)
    present = (member < GROUP)[:, None]
    peak = tl.full((MEMBERS, 1), float("-inf"), tl.float32)
    total = tl.zeros((MEMBERS, 1), tl.float32)
    acc = tl.zeros((MEMBERS, HEAD_SIZE), tl.float32)
    for start in range(first_program, last_program + 1, PARTS):
        new_peak = peak
        for offset in tl.static_range(PARTS):
            row, read = _part(start + offset, first_program, last_program, begins_inside, member, present, PADDED)
            part_peak = tl.load(peaks_ptr + row, mask=read, other=float("-inf"), cache_modifier=".cg")
            new_peak = tl.maximum(new_peak, part_peak)
        reference = tl.where(present, new_peak, 0.0)
        shrink = tl.exp2(peak - reference)
        total *= shrink
        acc *= shrink
        for offset in tl.static_range(PARTS):
            row, read = _part(start + offset, first_program, last_program, begins_inside, member, present, PADDED)
            part_peak = tl.load(peaks_ptr + row, mask=read, other=float("-inf"), cache_modifier=".cg")
            weight = tl.exp2(part_peak - reference)
            total += weight * tl.load(sums_ptr + row, mask=read, other=0.0, cache_modifier=".cg")
            acc += weight * tl.load(parts_ptr + row * HEAD_SIZE + dims, mask=read, other=0.0, cache_modifier=".cg")
        peak = new_peak
    if CASCADE:
        acc, total = _with_shared(
            acc, peak, total, shared_ptr, shared_lse_ptr, shared_row, num_shared, member, present, shared_step
        )
    at = member[:, None] * HEAD_SIZE + dims[None, :]
    tl.store(out_ptr + at, (acc / total).to(out_ptr.dtype.element_ty), mask=present)


@triton.jit
def _part(program, first_program, last_program, begins_inside, member, present, PADDED: tl.constexpr):
    """The rows [MEMBERS, 1] of what a program has of a run, and which of them to read: none past its last program.

    A program's first part is its slot 0; the part that begins a run inside a share is that share's last, slot 1.
    """
    place = program * 2 + ((program == first_program) & begins_inside).to(tl.int32)
    return (place * PADDED + member)[:, None], present & (program <= last_program)


@triton.jit
def _shared_rows(sequence_ptr, head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, range_rows):
    """First row of the results of a sequence's shared ranges for a KV head, and the number of ranges."""
    first, count, index = tl.load(sequence_ptr + 1), tl.load(sequence_ptr + 2), tl.load(sequence_ptr + 3)
    return (first * KV_HEADS + head) * range_rows + index * GROUP, count


@triton.jit
def _joined_whole(
    acc, peak, sum_, shared_ptr, shared_lse_ptr, shared_row, num_shared, GROUP: tl.constexpr, shared_step,
):  # fmt: skip
    """A run that lies within one program, joined with its shared ranges: weighted values and sums of weights."""
    member = tl.arange(0, acc.shape[0])
    acc, total = _with_shared(
        acc, peak[:, None], sum_[:, None], shared_ptr, shared_lse_ptr, shared_row, num_shared, member,
        (member < GROUP)[:, None], shared_step,
    )  # fmt: skip
    return acc, tl.sum(total, axis=1)


@triton.jit
def _with_shared(
    acc, peak, total, shared_ptr, shared_lse_ptr, shared_row, num_shared, member, present, shared_step,
):  # fmt: skip
    """Adds the results of shared ranges, past L1. peak, total, present: [N, 1]; shared_step: rows between two ranges.

    Several at a time, as in _join.
    """
    PARTS: tl.constexpr = 4
    dims = tl.arange(0, acc.shape[1])[None, :]
    for start in range(0, num_shared, PARTS):
        new_peak = peak
        for offset in tl.static_range(PARTS):
            row = (shared_row + (start + offset) * shared_step + member)[:, None]
            read = present & (start + offset < num_shared)
            part = tl.load(shared_lse_ptr + row, mask=read, other=float("-inf"), cache_modifier=".cg")
            new_peak = tl.maximum(new_peak, part)
        reference = tl.where(present, new_peak, 0.0)
        shrink = tl.exp2(peak - reference)
        total *= shrink
        acc *= shrink
        for offset in tl.static_range(PARTS):
            row = (shared_row + (start + offset) * shared_step + member)[:, None]
            read = present & (start + offset < num_shared)
            part = tl.load(shared_lse_ptr + row, mask=read, other=float("-inf"), cache_modifier=".cg")
            weight = tl.exp2(part - reference)
            total += weight
            acc += weight * tl.load(shared_ptr + row * acc.shape[1] + dims, mask=read, other=0.0, cache_modifier=".cg")
        peak = new_peak
    return acc, total
