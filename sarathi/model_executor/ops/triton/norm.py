"""RMS normalization, with the addition to the residual stream in the same pass. Knows nothing of layers."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """See ``native.norm.rms_norm``. x: [num_tokens, size] or [num_tokens, heads, size] with a last stride of 1."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = x.shape[1] if x.dim() == 3 else 1
    strides = (x.stride(0), x.stride(1) if x.dim() == 3 else 0)
    _launch(x, x, out, weight, eps, heads=heads, strides=strides, add=False, pdl=pdl)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """See ``native.norm.add_rms_norm``. x: [num_tokens, size], last stride 1; residual: the same, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, out, weight, eps, heads=1, strides=(x.stride(0), 0), add=True, pdl=pdl)
    return out


def _launch(
    x: Tensor,
    residual: Tensor,
    out: Tensor,
    weight: Tensor,
    eps: float,
    *,
    heads: int,
    strides: tuple[int, int],
    add: bool,
    pdl: bool,
) -> None:
    size = x.shape[-1]
    rows = out.numel() // size
    if rows == 0:
        return
    block = triton.next_power_of_2(size)
    warps = max(1, min(16, block // 512))
    options = {"num_warps": warps, **({"launch_pdl": True} if pdl else {})}
    _rms_norm_kernel[(rows,)](
        x, residual, out, weight, eps, *strides, HEADS=heads, SIZE=size, BLOCK=block, ADD=add, PDL=pdl, **options
    )


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    weight_ptr,
    eps,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
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
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + cols, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * SIZE + cols, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    normed = (wide * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * SIZE + cols, (normed * weight).to(x_ptr.dtype.element_ty), mask=inside)
