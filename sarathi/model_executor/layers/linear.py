"""Matrix products with weights; knows how several projections share one weight, not what they are for."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sarathi.model_executor.placement import Placement

_ANY_ROWS = 64  # the row count that a packed layout is chosen for; layouts chosen for 16 and more serve all sizes well


class Linear:
    """y = x W^T + b, for one projection or for several fused by rows: parts={"q_proj": 512, "k_proj": 128, ...}.

    weight  [sum of parts, in_features]      q_proj rows
                                             k_proj rows
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool, place: Placement) -> None:
        self.parts = dict(parts)
        out_features = sum(parts.values())
        self.weight = torch.empty(out_features, in_features, dtype=place.dtype, device=place.device)
        self.bias = torch.empty(out_features, dtype=place.dtype, device=place.device) if bias else None
        self._multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    @classmethod
    def over(cls, weight: Tensor) -> "Linear":
        """The product with a weight that is kept elsewhere, [out_features, in_features]."""
        linear = cls(0, {}, bias=False, place=Placement(weight.dtype, weight.device))
        linear.weight = weight
        return linear

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, sum of parts]."""
        return self._multiply(x, self.weight, self.bias)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Names as in checkpoints (`prefix` + part + ".weight"), each with its rows of the fused tensor."""
        for tensor, kind in ((self.weight, "weight"), (self.bias, "bias")):
            if tensor is not None:
                for name, rows in zip(self.parts, torch.split(tensor, list(self.parts.values())), strict=True):
                    yield f"{prefix}{name}.{kind}", rows

    def pack(self) -> None:
        """Once the weight is filled: on CPUs brings it into oneDNN's blocked layout, 1.2 to 4 times as fast."""
        if _is_packable(self.weight):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _ANY_ROWS)
            self._multiply = _multiply_packed


def _is_packable(weight: Tensor) -> bool:
    """Whether oneDNN is in this torch and, for bfloat16, has kernels for this processor: it needs AVX-512 or newer."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a packed weight."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
