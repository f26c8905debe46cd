"""Rows of the embedding for tokens of which some are known to the device alone. Knows nothing of layers."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


def embed(token_ids: Tensor, newest: Tensor, weight: Tensor) -> Tensor:
    """See ``native.embedding.embed``. token_ids, newest: contiguous; weight: last stride 1."""
    tokens, size = token_ids.shape[0], weight.shape[1]
    out = torch.empty((tokens, size), dtype=weight.dtype, device=weight.device)
    if tokens:
        _embed_kernel[(tokens,)](
            *(token_ids, newest, weight, out, weight.stride(0)), SIZE=size, BLOCK=triton.next_power_of_2(size)
        )
    return out


@triton.jit
def _embed_kernel(
    token_ids_ptr, newest_ptr, weight_ptr, out_ptr, stride_weight, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    if token < 0:
        token = tl.load(newest_ptr + (-1 - token))  # a stand-in: see ops/types.py
    cols = tl.arange(0, BLOCK)
    inside = cols < SIZE
    values = tl.load(weight_ptr + token * stride_weight + cols, mask=inside)
    tl.store(out_ptr + row * SIZE + cols, values, mask=inside)
