"""Matrix products with their epilogues: chooses by shape which kernel computes one.

One token: a matrix-vector kernel. A few: the skinny kernel. More: cuBLAS, with the epilogue in kernels of its own.
"""

import torch
from torch import Tensor
from torch.nn import functional

from sarathi.model_executor.ops.triton.elementwise import silu_and_mul
from sarathi.model_executor.ops.triton.matvec import Epilogue, MatvecConfig, matvec
from sarathi.model_executor.ops.triton.skinny import MAX_TILES, MAX_TOKENS, SkinnyConfig, skinny

_BLOCK_N = 64
_BLOCK_K = 128
_RESIDENT = 2  # programs of the skinny kernel that fit one multiprocessor's shared memory


class LinearKernels:
    """The products of ``Ops`` on CUDA. Owns the counters of split products, so that one instance serves one stream."""

    def __init__(self, num_sms: int, device: torch.device, *, max_skinny_tokens: int = MAX_TOKENS, pdl: bool = False):
        """max_skinny_tokens: the largest batch for our own products, 0 (none) to 16. pdl: overlap each launch."""
        self._resident = num_sms * _RESIDENT
        self._max_skinny_tokens = min(max_skinny_tokens, MAX_TOKENS)
        self._counters = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        self._pdl = pdl

    def pack(self, weight: Tensor) -> Tensor:
        """See ``NativeOps.pack``: these kernels read weights as they are."""
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """See ``NativeOps.linear``. x, weight: last stride 1."""
        if not self._is_ours(x, weight):
            product: Tensor = functional.linear(x, weight, bias, out=out)  # type: ignore[call-arg]  # stubs lack it
            return product
        return self._product(x, weight, _empty(x, weight.shape[0]) if out is None else out, Epilogue(bias=bias))

    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> None:
        """See ``NativeOps.linear_add``. A product of cuBLAS is rounded before the bias is added."""
        if self._is_ours(x, weight):
            self._product(x, weight, residual, Epilogue(bias=bias, residual=residual))
            return
        torch.addmm(residual, x, weight.t(), out=residual)
        if bias is not None:
            residual.add_(bias)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``NativeOps.gated_linear``. A bias comes before the activation, which the epilogue cannot do."""
        if bias is not None or not self._is_ours(x, weight):
            return silu_and_mul(self.linear(x, weight, bias), pdl=self._pdl)
        return self._product(x, weight, _empty(x, weight.shape[0] // 2), Epilogue(gated=True))

    def _is_ours(self, x: Tensor, weight: Tensor) -> bool:
        if x.shape[0] == 1:
            return self._max_skinny_tokens > 0
        few = 1 < x.shape[0] <= self._max_skinny_tokens and x.shape[1] % _BLOCK_K == 0
        return few and weight.shape[0] <= MAX_TILES * _BLOCK_N and x.dtype in (torch.bfloat16, torch.float16)

    def _product(self, x: Tensor, weight: Tensor, out: Tensor, epilogue: Epilogue) -> Tensor:
        if x.shape[0] == 1:
            matvec(x, weight, out, epilogue, MatvecConfig(rows=2 if epilogue.gated else 4), pdl=self._pdl)
        elif x.shape[0] > 1:
            config = self._skinny_config(out.shape[1], x.shape[1], epilogue)
            skinny(x, weight, out, epilogue, config, self._counters, pdl=self._pdl)
        return out

    def _skinny_config(self, outputs: int, size: int, epilogue: Epilogue) -> SkinnyConfig:
        """Splits the inner dimension as far as all programs still run at once; two weight tiles need fewer stages."""
        splits = self._resident // -(-outputs // _BLOCK_N)
        stages = 3 if epilogue.gated else 4
        return SkinnyConfig(_BLOCK_N, _BLOCK_K, max(1, min(splits, 8, size // (4 * _BLOCK_K))), stages)


def _empty(x: Tensor, outputs: int) -> Tensor:
    return torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
