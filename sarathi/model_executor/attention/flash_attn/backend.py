"""Attention by FlashAttention, on contiguous slots and on blocks: one call for a mixed batch. Knows no memory policy.

Decodes on contiguous slots go to our own split-KV kernel where that is asked for: steps of nothing else, and the many
that stand before the chunks of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Capabilities
from sarathi.model_executor.attention.flash_attn.choice import candidates, choose, need_of
from sarathi.model_executor.attention.flash_attn.provider import Problem, Provider, VarlenStep, scheduled
from sarathi.model_executor.attention.metadata import DeviceStep, StepMetadata, first_decodes, make_step, rest_of
from sarathi.model_executor.attention.slot_pages import as_pages, page_table
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops import create_ops, overlaps_launches
from sarathi.model_executor.ops.types import NewTokens
from sarathi.model_executor.placement import Placement

if TYPE_CHECKING:
    from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode

_MANY_DECODES = 1024  # times KV heads: from there on a call for them and one for the chunks beat one for all


@dataclass(slots=True)
class FlashMetadata(StepMetadata):
    """A step, and what its first layer finds out for the others: places of the new tokens, division of the work."""

    varlen: dict[int | None, VarlenStep] = field(default_factory=dict)  # by window
    split: Split | None = None  # where many decodes stand before the chunks

    @classmethod
    def in_two(cls, step: DeviceStep, decodes: int) -> FlashMetadata:
        """Of a step whose first `decodes` sequences, on contiguous slots, are attended to by themselves."""
        return cls(step, split=Split(first_decodes(step, decodes), cls(rest_of(step, decodes))))


class Split(NamedTuple):
    """The two parts of a step."""

    decodes: DeviceStep
    rest: FlashMetadata


class FlashAttentionBackend(AttentionBackend):
    """One provider for one model."""

    def __init__(
        self, provider: Provider, arch: ModelArchitecture, place: Placement, decode: TritonDecode | None = None
    ) -> None:
        """decode: takes the steps in which each sequence has one new token; contiguous memory only."""
        self.provider, self.place, self._decode = provider, place, decode
        self.capabilities = Capabilities(True, provider.abilities.over_read_tokens)
        self._problem = Problem(
            arch.num_heads, arch.num_kv_heads, arch.head_size, place.dtype, arch.head_size**-0.5, None
        )
        self._ops = create_ops(place.device)
        self._num_heads, self._fewest_decodes = arch.num_heads, -(-_MANY_DECODES // arch.num_kv_heads)

    def plan(self, batch: Batch, address: Address) -> FlashMetadata:
        """See AttentionBackend; one copy to the device."""
        step, decodes = make_step(batch, address, self.place.device), batch.leading_decodes
        is_mixed = self._fewest_decodes <= decodes < len(batch.chunks)
        if is_mixed and self._decode is not None and step.rows is not None:
            return FlashMetadata.in_two(step, decodes)
        return self.plan_static(step)

    def plan_static(self, step: DeviceStep) -> FlashMetadata:
        """See AttentionBackend."""
        return FlashMetadata(step)

    def append_and_attend(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: FlashMetadata
    ) -> Tensor:
        """See AttentionBackend. Our decode kernel does all of it in one launch."""
        if self._decode is not None and self._decode.appends(metadata.step, new.table):
            return self._decode.append_and_attend(query, new, layer, metadata.step)
        return super().append_and_attend(query, new, positions, layer, metadata)

    def warm_up(self, layer: CacheLayer, max_num_seqs: int) -> None:
        """See AttentionBackend."""
        if self._decode is not None:
            self._decode.warm_up(self._num_heads, layer, self._fewest_decodes, max_num_seqs)

    def attend(self, query: Tensor, layer: CacheLayer, metadata: FlashMetadata) -> Tensor:
        """See AttentionBackend."""
        if self._decode is not None and metadata.step.is_slot_decode:
            return self._decode.attend(query, layer, metadata.step)
        if self._decode is not None and metadata.split is not None:
            return self._attend_in_two(self._decode, query, layer, metadata.split)
        return self._call(query, layer, metadata)

    def _attend_in_two(self, decode: TritonDecode, query: Tensor, layer: CacheLayer, split: Split) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        decodes = split.decodes.num_tokens
        decode.attend(query[:decodes], layer, split.decodes, out[:decodes])
        self._call(query[decodes:], layer, split.rest, out[decodes:])
        return out

    def _call(self, query: Tensor, layer: CacheLayer, metadata: FlashMetadata, out: Tensor | None = None) -> Tensor:
        problem = self._problem._replace(window=layer.window)
        cache = (layer.k, layer.v)
        if metadata.step.rows is not None and not self.provider.abilities.contiguous:
            page = self._page_tokens
            cache = (as_pages(layer.k, page).pages, as_pages(layer.v, page).pages)
        if layer.window not in metadata.varlen:
            metadata.varlen[layer.window] = self._varlen(metadata.step, layer, problem)
        return self.provider.attend(query, cache, metadata.varlen[layer.window], problem, out)

    @property
    def _page_tokens(self) -> int:
        return max(128, self.provider.abilities.block_multiple or 1)

    def _varlen(self, step: DeviceStep, layer: CacheLayer, problem: Problem) -> VarlenStep:
        rows, table, columns = step.rows, step.block_table, layer.k.shape[1]
        if rows is not None and not self.provider.abilities.contiguous:
            columns = self._page_tokens
            table = page_table(rows, -(-step.max_length // columns), as_pages(layer.k, columns))
            rows = None
        varlen = VarlenStep(
            step.starts,
            step.lengths,
            rows,
            table,
            step.max_new,
            step.max_length,
            causal=step.max_new > 1,
            only=step.only,
        )
        return scheduled(varlen, self.provider, problem, columns)


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> FlashAttentionBackend:
    """The best installed provider for `spec`; KernelUnavailableError says what to install where there is none."""
    capability = torch.cuda.get_device_capability(place.device)[0]
    provider = choose(spec, need_of(spec, arch, place.dtype, capability), candidates())
    return FlashAttentionBackend(provider, arch, place, _decode_kernel(spec, arch, place))


def _decode_kernel(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> TritonDecode | None:
    """A named version (fa3, ...) is measured as it is; `fa` takes whatever is fastest."""
    if spec.kernel != "fa" or spec.is_paged:
        return None
    from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode

    fits = TritonDecode.supports(arch.num_heads, arch.num_kv_heads, arch.head_size)
    return TritonDecode(arch.head_size, place.device, pdl=overlaps_launches(place.device)) if fits else None
