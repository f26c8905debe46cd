"""Feed-forward layers."""

from collections.abc import Iterator

from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.layers.basic import Linear
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.placement import Placement


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, arch: ModelArchitecture, place: Placement, ops: Ops) -> None:
        inner, hidden, bias = arch.intermediate_size, arch.hidden_size, arch.mlp_bias
        self.gate_up = Linear(hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias, place=place, ops=ops)
        self.down = Linear(inner, {"down_proj": hidden}, bias=bias, place=place, ops=ops)

    def add_to(self, x: Tensor, residual: Tensor) -> None:
        """Add the layer's output to the residual, in place. x, residual: [T, hidden_size]."""
        self.down.add_to(self.gate_up.gated(x), residual)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield from self.gate_up.parameters(prefix)
        yield from self.down.parameters(prefix)

    def pack(self) -> None:
        self.gate_up.pack()
        self.down.pack()
