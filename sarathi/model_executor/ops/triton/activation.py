"""SiLU and multiply in one pass over the two halves of a projection. Knows nothing of layers."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_BLOCK = 2048


def silu_and_mul(gate_up: Tensor, *, pdl: bool = False) -> Tensor:
    """See ``native.activation.silu_and_mul``. gate_up: [num_tokens, 2 * size] with a last stride of 1."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        options = {"num_warps": 8, **({"launch_pdl": True} if pdl else {})}
        grid = (tokens, triton.cdiv(size, _BLOCK))
        _silu_kernel[grid](gate_up, out, size, gate_up.stride(0), BLOCK=_BLOCK, PDL=pdl, **options)
    return out


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
