"""Matrix-vector product for one token, with what follows it in a decoder layer fused in: bias, gated activation or
addition to the residual. Knows nothing of layers.

One program computes a few output rows and reads them front to back: the kernel is a stream of weights and nothing
else, which is why it beats a matrix product that has to feed tensor cores.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class MatvecConfig(NamedTuple):
    """Shape of one program."""

    rows: int = 4  # output rows (a gated row counts once and reads two rows of weights)
    block_k: int = 2048  # elements of each row read at a time
    warps: int = 8


class Epilogue(NamedTuple):
    """What a product kernel does to its result before it stores it; None: nothing."""

    bias: Tensor | None = None  # [out]
    residual: Tensor | None = None  # [1, out]: added to the result
    gated: bool = False  # weight is [2 * out, in], gate rows first; the result is silu(gate) * up

    def pointers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bias and residual for a launch; x stands for what is not there, and is not read as such."""
        return (x if self.bias is None else self.bias), (x if self.residual is None else self.residual)

    @property
    def flags(self) -> dict[str, bool]:
        """What a kernel is compiled for."""
        return {"BIAS": self.bias is not None, "ADD": self.residual is not None, "GATED": self.gated}


def matvec(
    x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue, config: MatvecConfig, *, pdl: bool = False
) -> None:
    """``out = epilogue(x @ weight.T)``. x: [1, in], contiguous; weight: [out or 2 * out, in]; out: [1, out]."""
    size = x.shape[1]
    outputs = out.shape[1]
    block_k = min(config.block_k, triton.next_power_of_2(size))
    options = {"num_warps": config.warps, **({"launch_pdl": True} if pdl else {})}
    _matvec_kernel[(triton.cdiv(outputs, config.rows),)](
        *(x, weight, out, *epilogue.pointers(x), outputs, weight.stride(0)),
        SIZE=size,
        ROWS=config.rows,
        BLOCK_K=block_k,
        PDL=pdl,
        **epilogue.flags,
        **options,
    )


@triton.jit
def _weights(row_ptr, cols, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    # Read once by this step: past L1, which is left to the input that all programs share.
    if SIZE % BLOCK_K == 0:
        return tl.load(row_ptr + cols[None, :], cache_modifier=".cg")
    return tl.load(row_ptr + cols[None, :], mask=cols[None, :] < SIZE, other=0.0, cache_modifier=".cg")


@triton.jit
def _matvec_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    outputs,
    stride_weight,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows past the end read the last row and are not stored: no mask in the loop.
    near = tl.minimum(rows, outputs - 1).to(tl.int64)
    gate_ptr = weight_ptr + near[:, None] * stride_weight
    up_ptr = gate_ptr + outputs.to(tl.int64) * stride_weight
    cols = tl.arange(0, BLOCK_K)
    weights = _weights(gate_ptr, cols, SIZE, BLOCK_K)
    if GATED:
        up_weights = _weights(up_ptr, cols, SIZE, BLOCK_K)
    if PDL:
        gdc_wait()  # the weights above were never written: only what follows needs the kernel before
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    up_total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK_K):
        at = start + cols
        inside = at < SIZE
        if start > 0:
            weights = _weights(gate_ptr, at, SIZE, BLOCK_K)
            if GATED:
                up_weights = _weights(up_ptr, at, SIZE, BLOCK_K)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += weights.to(tl.float32) * x[None, :]
        if GATED:
            up_total += up_weights.to(tl.float32) * x[None, :]
    result = tl.sum(total, axis=1)
    up = tl.sum(up_total, axis=1)
    stored = rows < outputs
    if GATED:
        result = result * tl.sigmoid(result) * up
    if BIAS:
        result += tl.load(bias_ptr + rows, mask=stored, other=0.0).to(tl.float32)
    if ADD:
        result += tl.load(residual_ptr + rows, mask=stored, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=stored)
