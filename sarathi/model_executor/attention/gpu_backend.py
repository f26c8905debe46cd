"""Base of the GPU attention backends, with our split-KV kernel for decodes on slots."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.attention.metadata import DeviceStep, make_step, with_cascade
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops import create_ops, overlaps_launches
from sarathi.model_executor.ops.types import CascadeShape, NewTokens
from sarathi.model_executor.placement import Placement

if TYPE_CHECKING:
    from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode


class GpuBackend(AttentionBackend):
    """A library's kernels. Metadata is a StepMetadata."""

    def __init__(self, arch: ModelArchitecture, place: Placement, decode: TritonDecode | None, fewest: int) -> None:
        """decode: the kernel of steps with `fewest` or more decodes on slots; None: the library's kernels."""
        self.arch, self.place, self._decode, self._fewest_decodes = arch, place, decode, fewest
        self._ops = create_ops(place.device)

    def enable_cascade(self) -> bool:
        """See AttentionBackend. The decode kernel serves it, on slots."""
        if self._decode is None:
            return False
        self._decode.enable_cascade(self.arch.num_heads, self.arch.num_kv_heads)
        return True

    @property
    def cascade(self) -> CascadeShape | None:
        """See AttentionBackend."""
        return None if self._decode is None else self._decode.cascade

    def _make_step(self, batch: Batch, address: Address) -> DeviceStep:
        """The step of a batch, with the cascade plan of its leading decodes."""
        step = make_step(batch.chunks, address, self.place.device)
        cascade = self.cascade if batch.groups and isinstance(address, SlotAddress) else None
        if cascade is None:
            return step
        return with_cascade(step, batch.groups, address.slots, batch.leading_decodes, cascade)

    @abstractmethod
    def attend(self, query: Tensor, layer: CacheLayer, metadata: Metadata, out: Tensor | None = None) -> Tensor:
        """See AttentionBackend. Returns `out`, contiguous, if given."""

    def append_and_attend(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: Metadata
    ) -> Tensor:
        """See AttentionBackend. The decode kernel does all of it in one launch."""
        if self._decode is not None and self._decode.appends(metadata.step, new):
            return self._decode.append_and_attend(query, new, layer, metadata.step)
        return super().append_and_attend(query, new, positions, layer, metadata)

    def warm_up(self, layer: CacheLayer, max_num_seqs: int) -> None:
        """See AttentionBackend."""
        if self._decode is not None:
            fewest = self._fewest_apart(cascades=self.cascade is not None)
            self._decode.warm_up(self.arch.num_heads, layer, fewest, max_num_seqs)

    def _fewest_apart(self, *, cascades: bool) -> int:
        """The least number of decodes in a mixed step that the decode kernel computes apart.

        cascades: whether they share tokens, which only that kernel reads once.
        """
        return 1 if cascades else self._fewest_decodes


def decode_kernel(arch: ModelArchitecture, place: Placement) -> TritonDecode | None:
    """Our decode kernel; None if it does not support the model's heads."""
    from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode

    fits = TritonDecode.supports(arch.num_heads, arch.num_kv_heads, arch.head_size)
    return TritonDecode(arch.head_size, place.device, pdl=overlaps_launches(place.device)) if fits else None
