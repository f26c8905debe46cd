"""Kernels that pass once over their input: RMS normalization, SiLU and multiply, the embedding."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_SILU_BLOCK = 2048


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """See ``NativeOps.rms_norm``. x: [num_tokens, size] or [num_tokens, heads, size] with a last stride of 1."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.shape[-1]
    rows = out.numel() // size
    if rows:
        heads, stride_head = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
        block = triton.next_power_of_2(size)
        options = {"num_warps": max(1, min(16, block // 512)), **({"launch_pdl": True} if pdl else {})}
        _rms_norm_kernel[(rows,)](
            x, out, weight, eps, x.stride(0), stride_head, HEADS=heads, SIZE=size, BLOCK=block, PDL=pdl, **options
        )
    return out


def silu_and_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """See ``NativeOps.silu_and_mul``. gate_up: [num_tokens, 2 * size] with a last stride of 1."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        options = {"num_warps": 8, **({"launch_pdl": True} if pdl else {})}
        grid = (tokens, triton.cdiv(size, _SILU_BLOCK))
        _silu_kernel[grid](gate_up, out, size, gate_up.stride(0), BLOCK=_SILU_BLOCK, PDL=pdl, **options)
    return out


def embed(token_ids: Tensor, weight: Tensor, last_tokens: Tensor | None = None) -> Tensor:
    """See ``NativeOps.embed``. token_ids, last_tokens: contiguous; weight: last stride 1."""
    tokens, size = token_ids.shape[0], weight.shape[1]
    out = torch.empty((tokens, size), dtype=weight.dtype, device=weight.device)
    if tokens:
        resolved = token_ids if last_tokens is None else last_tokens  # not read where there are no placeholder tokens
        _embed_kernel[(tokens,)](
            *(token_ids, resolved, weight, out, weight.stride(0)), SIZE=size, BLOCK=triton.next_power_of_2(size)
        )
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    out_ptr,
    weight_ptr,
    eps,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < SIZE
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)  # no earlier kernel writes it
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + (row // HEADS) * stride_token + (row % HEADS) * stride_head + cols, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    normed = (wide * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * SIZE + cols, (normed * weight).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _silu_kernel(gate_up_ptr, out_ptr, size, stride_token, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    row_ptr = gate_up_ptr + token * stride_token
    gate = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + size + cols, mask=inside, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * size + cols, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _embed_kernel(
    token_ids_ptr, last_tokens_ptr, weight_ptr, out_ptr, stride_weight, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids_ptr + index).to(tl.int64)
    if token < 0:
        token = tl.load(last_tokens_ptr + (-1 - token)).to(tl.int64)  # a placeholder token
    cols = tl.arange(0, BLOCK)
    inside = cols < SIZE
    values = tl.load(weight_ptr + token * stride_weight + cols, mask=inside)
    tl.store(out_ptr + index * SIZE + cols, values, mask=inside)
