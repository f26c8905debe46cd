"""A backend that computes nothing, to time everything else; knows only its shapes. Outputs mean nothing."""

from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.placement import Placement


class NoOpBackend:
    """Neither stores nor reads K and V."""

    def plan(self, batch: Batch, address: Address) -> None:
        """Nothing to share between layers."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layer: CacheLayer, metadata: None) -> Tensor:
        """The query as it came, [T, num_heads, D]."""
        return query.contiguous()


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> NoOpBackend:
    """Every architecture and device will do."""
    return NoOpBackend()
