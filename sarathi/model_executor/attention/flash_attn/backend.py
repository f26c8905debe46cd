"""Attention by FlashAttention, on slots and on blocks: one call for a mixed step.

With `fa`, without a version, our split-KV kernel computes decodes on slots: those of steps with decodes only, and many
decodes before the chunks of a mixed step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import Capabilities
from sarathi.model_executor.attention.flash_attn.choice import candidates, choose, requirements_of
from sarathi.model_executor.attention.flash_attn.provider import AttentionParams, Provider, VarlenStep, scheduled
from sarathi.model_executor.attention.gpu_backend import GpuBackend, decode_kernel
from sarathi.model_executor.attention.metadata import DeviceStep, StepMetadata, first_decodes, make_step, rest_of
from sarathi.model_executor.attention.slot_pages import (
    as_pages,
    fits_block_table,
    has_tma_strides,
    one_slot,
    page_table,
)
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.placement import Placement

if TYPE_CHECKING:
    from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode

_MANY_DECODES = 1024  # times KV heads: from this many on, separate calls for decodes and chunks are faster than one


class KernelCall(NamedTuple):
    """One call of the library."""

    tokens: slice  # of the step's new tokens
    slot: int | None  # the only slot of the call; None: the whole cache
    is_paged_view: bool  # slots are passed as pages
    step: VarlenStep


@dataclass(slots=True)
class FlashMetadata(StepMetadata):
    """A step, and its calls of the library: the first layer of each window makes them, the others reuse them.

    chunks, slots: the step's sequences as the host knows them; empty where paged, and in a static step.
    """

    chunks: tuple[Chunk, ...] = ()
    slots: tuple[int, ...] = ()
    calls: dict[int | None, list[KernelCall]] = field(default_factory=dict)
    split: Split | None = None  # set if many decodes precede the chunks

    def divided(self, decodes: int) -> FlashMetadata:
        """The same step, on slots, with its first `decodes` sequences split from the rest."""
        rest = FlashMetadata(rest_of(self.step, decodes), self.chunks[decodes:], self.slots[decodes:])
        return FlashMetadata(self.step, split=Split(first_decodes(self.step, decodes), rest))


class Split(NamedTuple):
    """The two parts of a step."""

    decodes: DeviceStep
    rest: FlashMetadata


class FlashAttentionBackend(GpuBackend):
    """One library for one model."""

    def __init__(
        self, provider: Provider, arch: ModelArchitecture, place: Placement, decode: TritonDecode | None = None
    ) -> None:
        """decode: attends decodes on slots; None: the library does."""
        super().__init__(arch, place, decode, -(-_MANY_DECODES // arch.num_kv_heads))
        self.provider = provider
        self.capabilities = Capabilities(True, provider.capabilities.over_read_tokens)
        self._params = AttentionParams(
            arch.num_heads, arch.num_kv_heads, arch.head_size, place.dtype, arch.head_size**-0.5, None
        )
        self._page_tokens = max(128, provider.capabilities.block_multiple or 1)  # page size of slots passed as pages

    def plan(self, batch: Batch, address: Address) -> FlashMetadata:
        """See AttentionBackend. One copy to the device."""
        step = self._make_step(batch, address)
        if not isinstance(address, SlotAddress):
            return FlashMetadata(step)
        metadata, decodes = FlashMetadata(step, batch.chunks, address.slots), batch.leading_decodes
        fewest = self._fewest_apart(cascades=step.cascade is not None)
        is_divided = self._decode is not None and fewest <= decodes < len(batch.chunks)
        return metadata.divided(decodes) if is_divided else metadata

    def plan_static(self, step: DeviceStep) -> FlashMetadata:
        """See AttentionBackend."""
        return FlashMetadata(step)

    def can_capture(self, layer: CacheLayer) -> bool:
        """See AttentionBackend. The host does not know a static step's slots: one call must address all of them."""
        return self._decode is not None or self._addresses_all(layer.k)

    def attend(self, query: Tensor, layer: CacheLayer, metadata: FlashMetadata, out: Tensor | None = None) -> Tensor:
        """See GpuBackend."""
        if self._decode is not None and metadata.step.is_slot_decode:
            return self._decode.attend(query, layer, metadata.step, out)
        if self._decode is not None and metadata.split is not None:
            return self._attend_split(self._decode, query, layer, metadata.split, out)
        return self._call(query, layer, metadata, out)

    def _attend_split(
        self, decode: TritonDecode, query: Tensor, layer: CacheLayer, split: Split, out: Tensor | None
    ) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        decodes = split.decodes.num_tokens
        decode.attend(query[:decodes], layer, split.decodes, out[:decodes])
        self._call(query[decodes:], layer, split.rest, out[decodes:])
        return out

    def _call(self, query: Tensor, layer: CacheLayer, metadata: FlashMetadata, out: Tensor | None = None) -> Tensor:
        """Call the library, usually once."""
        params = self._params._replace(window=layer.window)
        if layer.window not in metadata.calls:
            metadata.calls[layer.window] = list(self._make_calls(layer, metadata, params))
        calls = metadata.calls[layer.window]
        if len(calls) == 1:
            return self._run(query, layer, calls[0], params, out)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        for call in calls:
            self._run(query[call.tokens], layer, call, params, out[call.tokens])
        return out

    def _run(
        self, query: Tensor, layer: CacheLayer, call: KernelCall, params: AttentionParams, out: Tensor | None
    ) -> Tensor:
        cache = (layer.k, layer.v)
        if call.slot is not None:
            cache = (one_slot(layer.k, call.slot), one_slot(layer.v, call.slot))
        if call.is_paged_view:
            cache = (as_pages(cache[0], self._page_tokens).pages, as_pages(cache[1], self._page_tokens).pages)
        return self.provider.attend(query, cache, call.step, params, out)

    def _make_calls(self, layer: CacheLayer, metadata: FlashMetadata, params: AttentionParams) -> Iterator[KernelCall]:
        """One call, or one for each sequence if the library cannot address all slots of the cache in one."""
        if not metadata.slots or self._addresses_all(layer.k):
            yield self._make_call(metadata.step, layer.k, params)
            return
        first = 0
        for chunk, slot in zip(metadata.chunks, metadata.slots, strict=True):
            tokens = slice(first, first + chunk.num_tokens)
            step = make_step([chunk], SlotAddress((0,)), self.place.device)
            call = self._make_call(step, one_slot(layer.k, slot), params)
            yield call._replace(tokens=tokens, slot=slot)
            first = tokens.stop

    def _make_call(self, step: DeviceStep, cache: Tensor, params: AttentionParams) -> KernelCall:
        """The call for all sequences of a step over a cache."""
        slots, table, columns = step.slots, step.block_table, cache.shape[1]
        is_paged_view = slots is not None and not self.provider.capabilities.contiguous
        if slots is not None and is_paged_view:
            columns = self._page_tokens
            table = page_table(slots, -(-step.max_length // columns), as_pages(cache, columns))
            slots = None
        varlen = VarlenStep(
            step.starts, step.lengths, slots, table, step.max_new, step.max_length, causal=step.max_new > 1,
            only=None if is_paged_view else step.only,
        )  # fmt: skip
        varlen = scheduled(varlen, self.provider, params, columns)
        return KernelCall(slice(0, step.num_tokens), None, is_paged_view, varlen)

    def _addresses_all(self, cache: Tensor) -> bool:
        """Whether one call can address every slot of the cache: see slot_pages."""
        if self.provider.capabilities.contiguous:
            return has_tma_strides(cache)
        return fits_block_table(cache, self._page_tokens)


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> FlashAttentionBackend:
    """The best installed library for `spec`. KernelUnavailableError says what to install if there is none."""
    compute_capability = torch.cuda.get_device_capability(place.device)[0]
    provider = choose(spec, requirements_of(spec, arch, place.dtype, compute_capability), candidates())
    is_fastest = spec.kernel == "fa" and not spec.is_paged  # fa3 and other versions compute everything themselves
    return FlashAttentionBackend(provider, arch, place, decode_kernel(arch, place) if is_fastest else None)
