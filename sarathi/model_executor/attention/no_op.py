"""A backend that computes nothing, to measure everything else. Outputs are meaningless."""

from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Capabilities
from sarathi.model_executor.attention.metadata import DeviceStep
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops.types import NewTokens
from sarathi.model_executor.placement import Placement


class NoOpBackend(AttentionBackend):
    """Applies no RoPE; neither stores nor reads keys and values."""

    capabilities = Capabilities(captures_cuda_graphs=True)

    def plan(self, batch: Batch, address: Address) -> None:
        """There is no metadata."""

    def plan_static(self, step: DeviceStep) -> None:
        """There is no metadata."""

    def rope_and_store(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: None
    ) -> None:
        """Nothing is computed."""

    def attend(self, query: Tensor, layer: CacheLayer, metadata: None) -> Tensor:
        """The query, contiguous."""
        return query.contiguous()


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> NoOpBackend:
    """For every architecture, memory and device."""
    return NoOpBackend()
