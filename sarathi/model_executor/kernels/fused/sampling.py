"""Argmax and Gumbel-max sampling over the vocabulary, without a word to the host. Knows nothing of requests."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sarathi.model_executor.kernels.types import NoiseKey

_BLOCK = 4096
_ROUNDS = tl.constexpr(7)  # as in the torch twin


def argmax(logits: Tensor) -> Tensor:
    """See ``reference.sampling.argmax``. logits: [num_rows, vocab_size], last stride 1."""
    return _launch(logits, logits, NoiseKey(logits, logits), noise=False)


def sample(logits: Tensor, temperatures: Tensor, key: NoiseKey) -> Tensor:
    """See ``reference.sampling.sample``. Safe in a CUDA graph: keys and temperatures are read on the device."""
    return _launch(logits, temperatures, key, noise=True)


def _launch(logits: Tensor, temperatures: Tensor, key: NoiseKey, *, noise: bool) -> Tensor:
    rows, vocab_size = logits.shape
    blocks = triton.cdiv(vocab_size, _BLOCK)
    best = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return tokens
    _block_kernel[(blocks, rows)](
        *(logits, temperatures, *key, best, where, logits.stride(0)),
        VOCAB_SIZE=vocab_size,
        BLOCK=_BLOCK,
        NOISE=noise,
        num_warps=8,
    )
    _row_kernel[(rows,)](best, where, tokens, BLOCKS=blocks, PADDED=triton.next_power_of_2(blocks), num_warps=1)
    return tokens


@triton.jit
def _block_kernel(
    logits_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    where_ptr,
    stride_row,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NOISE: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < VOCAB_SIZE
    scores = tl.load(logits_ptr + row * stride_row + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    if NOISE:
        temperature = tl.load(temperatures_ptr + row)
        if temperature > 0:
            seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
            scores = scores / temperature - tl.log(_exponential(seed, position, tokens))
    best, where = tl.max(scores, axis=0, return_indices=True)
    slot = row * tl.num_programs(0) + block
    tl.store(best_ptr + slot, best)
    tl.store(where_ptr + slot, block * BLOCK + where)


@triton.jit
def _exponential(seed, position, tokens):
    zeros = tokens * 0
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, tokens, zeros.to(tl.uint32) + low, zeros.to(tl.uint32) + high, zeros, _ROUNDS)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    return tl.where(uniform < 0.00390625, series, -tl.log(tl.maximum(1.0 - uniform, 5.9604644775390625e-08)))


@triton.jit
def _row_kernel(best_ptr, where_ptr, tokens_ptr, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, PADDED)
    best = tl.load(best_ptr + row * BLOCKS + blocks, mask=blocks < BLOCKS, other=float("-inf"))
    _, winner = tl.max(best, axis=0, return_indices=True)
    tl.store(tokens_ptr + row, tl.load(where_ptr + row * BLOCKS + winner).to(tl.int64))
