"""Argmax, masks, draws and top-p over a vocabulary. Nothing waits for the device."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WALK_BLOCK = 8192  # for a program that handles all logits of one sample


class _Into(NamedTuple):
    slots: Tensor
    last_tokens: Tensor


def argmax(logits: Tensor) -> Tensor:
    """See ``NativeOps.argmax``. logits: [num_samples, vocab_size], last stride 1."""
    return _argmax(logits)


def argmax_into(logits: Tensor, slots: Tensor, last_tokens: Tensor) -> Tensor:
    """See ``NativeOps.argmax_into``. logits: last stride 1; slots, last_tokens: contiguous."""
    return _argmax(logits, _Into(slots, last_tokens))


def mask_tokens(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """See ``NativeOps.mask_tokens``. logits: last stride 1; rows, bits: contiguous."""
    vocab_size = logits.shape[1]
    if len(rows):
        _mask_kernel[(triton.cdiv(vocab_size, _BLOCK), len(rows))](
            *(logits, rows, bits, logits.stride(0), bits.shape[1]), VOCAB_SIZE=vocab_size, BLOCK=_BLOCK, num_warps=8
        )


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """See ``NativeOps.draw``; sums are in another order. logits: last stride 1; uniform: contiguous."""
    return _walk(_draw_kernel, logits, uniform, torch.empty(len(logits), dtype=torch.int64, device=logits.device))


def top_p_threshold(logits: Tensor, top_p: Tensor) -> Tensor:
    """See ``NativeOps.top_p_threshold``; ties and the rounding of sums apart. logits: last stride 1."""
    return _walk(
        _threshold_kernel, logits, top_p, torch.empty((len(logits), 1), dtype=torch.float32, device=logits.device)
    )


def _walk(kernel: Any, logits: Tensor, parameters: Tensor, results: Tensor) -> Tensor:
    """Fill `results` by one program per sample, which walks over its logits a block at a time."""
    rows, vocab_size = logits.shape
    if rows:
        block = min(_WALK_BLOCK, triton.next_power_of_2(vocab_size))
        kernel[(rows,)](
            *(logits, parameters, results, logits.stride(0)), VOCAB_SIZE=vocab_size, BLOCK=block, num_warps=16
        )
    return results


def _argmax(logits: Tensor, into: _Into | None = None) -> Tensor:
    rows, vocab_size = logits.shape
    blocks = triton.cdiv(vocab_size, _BLOCK)
    best = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    _block_kernel[(blocks, rows)](
        *(logits, best, where, logits.stride(0)), VOCAB_SIZE=vocab_size, BLOCK=_BLOCK, num_warps=8
    )
    _row_kernel[(rows,)](
        *(best, where, tokens, *(into or _Into(tokens, tokens))),
        BLOCKS=blocks,
        PADDED=triton.next_power_of_2(blocks),
        INTO=into is not None,
        num_warps=1,
    )
    return tokens


@triton.jit
def _block_kernel(logits_ptr, best_ptr, where_ptr, stride_row, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < VOCAB_SIZE
    scores = tl.load(logits_ptr + row * stride_row + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    scores = tl.where(scores != scores, float("inf"), scores)  # NaN: found as an infinite logit is
    best, where = tl.max(scores, axis=0, return_indices=True)
    index = row * tl.num_programs(0) + block
    tl.store(best_ptr + index, best)
    tl.store(where_ptr + index, block * BLOCK + where)


@triton.jit
def _row_kernel(
    best_ptr,
    where_ptr,
    tokens_ptr,
    slots_ptr,
    last_tokens_ptr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    INTO: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, PADDED)
    best = tl.load(best_ptr + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=float("-inf"))
    largest, winner = tl.max(best, axis=0, return_indices=True)
    token = tl.load(where_ptr + row * BLOCKS + winner).to(tl.int64)
    token = tl.where(tl.abs(largest) == float("inf"), -1, token)
    tl.store(tokens_ptr + row, token)
    if INTO:
        tl.store(last_tokens_ptr + tl.load(slots_ptr + row), tl.maximum(token, 0))


@triton.jit
def _mask_kernel(logits_ptr, rows_ptr, bits_ptr, stride_row, words, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < VOCAB_SIZE
    word = tl.load(bits_ptr + index * words + tokens // 32, mask=inside, other=-1)
    is_barred = ((word >> (tokens % 32)) & 1) == 0
    row_ptr = logits_ptr + tl.load(rows_ptr + index) * stride_row
    tl.store(row_ptr + tokens, float("-inf"), mask=inside & is_barred)


@triton.jit
def _threshold_kernel(logits_ptr, top_p_ptr, thresholds_ptr, stride_row, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Bisection between a bound below the threshold and the largest logit; both ends move to logits that are there.

    So it takes as many passes as the distinct logits within reach have binary digits: about ten for bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    top_p = tl.load(top_p_ptr + row)
    threshold = float("-inf")
    if top_p < 1.0:
        row_ptr = logits_ptr + row * stride_row
        most = _largest(row_ptr, VOCAB_SIZE, BLOCK)
        total, _, _ = _split_at(row_ptr, float("-inf"), most, VOCAB_SIZE, BLOCK)
        target = top_p * total
        # All tokens below this bound together have less than 1 - top_p; the 1 is for rounding.
        lower = most + tl.log((1.0 - top_p) / VOCAB_SIZE) - 1.0
        upper = most
        while lower < upper:
            middle = lower + (upper - lower) * 0.5
            middle = tl.where(middle > lower, middle, upper)
            mass, above, below = _split_at(row_ptr, middle, most, VOCAB_SIZE, BLOCK)
            reached = mass >= target
            lower = tl.where(reached, above, lower)
            upper = tl.where(reached, upper, below)
        threshold = upper
    tl.store(thresholds_ptr + row, threshold)


@triton.jit
def _draw_kernel(logits_ptr, uniform_ptr, tokens_ptr, stride_row, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of blocks, twice in the same order, so that the second walk ends where the first one said it would."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    most = _largest(row_ptr, VOCAB_SIZE, BLOCK)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, VOCAB_SIZE, BLOCK):
        total += tl.sum(_masses(row_ptr, start, most, VOCAB_SIZE, BLOCK), axis=0)
    target = tl.load(uniform_ptr + row) * total
    passed = tl.full((), 0.0, tl.float64)
    drawn = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        masses = _masses(row_ptr, start, most, VOCAB_SIZE, BLOCK)
        after = passed + tl.sum(masses, axis=0)
        if (passed <= target) & (after > target):
            at = start + tl.arange(0, BLOCK)
            exceeding = passed + tl.cumsum(masses, axis=0) > target
            last = tl.max(tl.where(masses > 0, at, 0), axis=0)  # a scan may end a rounding below the sum
            drawn = tl.minimum(tl.min(tl.where(exceeding, at, last), axis=0), last)
        passed = after
    tl.store(tokens_ptr + row, drawn.to(tl.int64))


@triton.jit
def _masses(row_ptr, start, most, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """exp(logit - most) of one block, float64."""
    at = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + at, mask=at < VOCAB_SIZE, other=float("-inf"))
    return tl.exp(logits - most).to(tl.float64)


@triton.jit
def _largest(row_ptr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    tokens = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        at = start + tokens
        largest = tl.maximum(largest, tl.load(row_ptr + at, mask=at < VOCAB_SIZE, other=float("-inf")))
    return tl.max(largest, axis=0)


@triton.jit
def _split_at(row_ptr, threshold, most, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of exp(logit - most) over logits from the threshold on, the smallest of them, and the largest below it."""
    tokens = tl.arange(0, BLOCK)
    mass = tl.zeros((BLOCK,), tl.float32)
    above = tl.full((BLOCK,), float("inf"), tl.float32)
    below = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        at = start + tokens
        logits = tl.load(row_ptr + at, mask=at < VOCAB_SIZE, other=float("-inf"))
        inside = logits >= threshold
        mass += tl.where(inside, tl.exp(logits - most), 0.0)
        above = tl.minimum(above, tl.where(inside, logits, float("inf")))
        below = tl.maximum(below, tl.where(inside, float("-inf"), logits))
    return tl.sum(mass, axis=0), tl.min(above, axis=0), tl.max(below, axis=0)
