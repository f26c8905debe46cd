"""Attention by FlashInfer (Ye et al., 2025): on blocks, and on contiguous slots. Knows no memory policy.

    step                              blocks                    contiguous slots
    one new token for each sequence   paged decode              our split-KV kernel, or paged decode over the slots
    decodes, then one chunk           paged prefill             decode as above, then the single-sequence prefill
    anything else                     paged prefill             paged prefill over the slots

Where a paged kernel runs over slots, their pages are in order and the block table is arithmetic: no byte moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flashinfer
import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Capabilities, KernelUnavailableError
from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode
from sarathi.model_executor.attention.metadata import StepMetadata, first_decodes, make_step
from sarathi.model_executor.attention.slot_pages import as_pages
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops import create_ops, overlaps_launches
from sarathi.model_executor.ops.types import NewTokens
from sarathi.model_executor.placement import Placement

_SCRATCH_BYTES = 512 * 2**20
_SLOT_PAGE_TOKENS = 64  # of a slot seen as pages
_HEAD_SIZES = (64, 128, 256)


@dataclass(slots=True)
class FlashInferMetadata(StepMetadata):
    """A step, and what its first layer finds out for the others."""

    batch: Batch
    address: Address
    leading_decodes: int
    wrapper: Any = None  # the planned paged kernel


class _Paged:
    """A paged kernel, planned anew for each step while the step before may still wait for the device.

    A plan travels through one pinned buffer of the wrapper's, which the next plan fills again: not before the device
    has taken the plan that lies there.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def planned(self, *arguments: Any, **options: Any) -> Any:
        """The wrapper, to run on each layer."""
        self._taken.synchronize()
        self._wrapper.plan(*arguments, **options)
        self._taken.record()
        return self._wrapper


class FlashInferBackend(AttentionBackend):
    """FlashInfer's kernels for one model."""

    capabilities = Capabilities(over_read_tokens=255)  # the single-sequence prefill copies whole tiles of keys

    def __init__(self, arch: ModelArchitecture, place: Placement, decode: TritonDecode | None = None) -> None:
        """decode: takes steps of one new token a sequence on contiguous slots; None: FlashInfer's paged kernel does."""
        self.arch, self.place, self._decode = arch, place, decode
        self._scale = arch.head_size**-0.5
        self._ops = create_ops(place.device)
        self._num_heads = arch.num_heads
        scratch = torch.zeros(_SCRATCH_BYTES, dtype=torch.uint8, device=place.device)
        self._paged_decode = _Paged(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
        )
        self._paged_prefill = _Paged(flashinfer.BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD"))

    def plan(self, batch: Batch, address: Address) -> FlashInferMetadata:
        """See AttentionBackend. The paged kernels are planned when the first layer shows how its slots lie."""
        step = make_step(batch, address, self.place.device)
        return FlashInferMetadata(step, batch, address, batch.leading_decodes)

    def append_and_attend(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: FlashInferMetadata
    ) -> Tensor:
        """See AttentionBackend. Our decode kernel does all of it in one launch."""
        if self._decode is not None and self._decode.appends(metadata.step, new.table):
            return self._decode.append_and_attend(query, new, layer, metadata.step)
        return super().append_and_attend(query, new, positions, layer, metadata)

    def warm_up(self, layer: CacheLayer, max_num_seqs: int) -> None:
        """See AttentionBackend."""
        if self._decode is not None:
            self._decode.warm_up(self._num_heads, layer, 1, max_num_seqs)

    def attend(self, query: Tensor, layer: CacheLayer, metadata: FlashInferMetadata) -> Tensor:
        """See AttentionBackend."""
        if isinstance(metadata.address, BlockAddress):
            return self._paged(query, layer, metadata)
        decodes, total = metadata.leading_decodes, len(metadata.batch.chunks)
        if decodes == total:
            return self._decode_slots(query, layer, metadata)
        if decodes == total - 1 and (decodes == 0 or self._decode is not None):
            return self._decodes_then_chunk(query, layer, metadata, metadata.address.slots[-1])
        return self._paged(query, layer, metadata)

    def _decode_slots(self, query: Tensor, layer: CacheLayer, metadata: FlashInferMetadata) -> Tensor:
        if self._decode is None:
            return self._paged(query, layer, metadata)
        return self._decode.attend(query, layer, metadata.step)

    def _decodes_then_chunk(self, query: Tensor, layer: CacheLayer, metadata: FlashInferMetadata, slot: int) -> Tensor:
        decodes, chunk = metadata.leading_decodes, metadata.batch.chunks[-1]
        prefilled = self._prefill_slot(query[decodes:], layer, slot, chunk.start + chunk.num_tokens)
        if self._decode is None or decodes == 0:
            return prefilled
        decoded = self._decode.attend(query[:decodes], layer, first_decodes(metadata.step, decodes))
        return torch.cat((decoded, prefilled))

    def _prefill_slot(self, query: Tensor, layer: CacheLayer, slot: int, length: int) -> Tensor:
        out: Tensor = flashinfer.single_prefill_with_kv_cache(
            query,
            layer.k[slot, :length],
            layer.v[slot, :length],
            causal=True,
            sm_scale=self._scale,
            window_left=_window_left(layer),
        )
        return out

    def _paged(self, query: Tensor, layer: CacheLayer, metadata: FlashInferMetadata) -> Tensor:
        keys, values = layer.k, layer.v
        if not isinstance(metadata.address, BlockAddress):
            keys, values = (as_pages(x, _SLOT_PAGE_TOKENS).pages for x in (keys, values))
        if metadata.wrapper is None:
            metadata.wrapper = self._planned(layer, metadata)
        out: Tensor = metadata.wrapper.run(query, (keys, values))
        return out

    def _planned(self, layer: CacheLayer, metadata: FlashInferMetadata) -> Any:
        lengths = [chunk.start + chunk.num_tokens for chunk in metadata.batch.chunks]
        if isinstance(metadata.address, BlockAddress):
            page = layer.k.shape[1]
            tables: Sequence[Sequence[int]] = metadata.address.block_tables
        else:
            page = _SLOT_PAGE_TOKENS
            tables = _slot_tables(layer.k, metadata.address.slots, lengths)
        counts = [-(-length // page) for length in lengths]
        indices = [block for table, count in zip(tables, counts, strict=True) for block in table[:count]]
        last = [length - (count - 1) * page for length, count in zip(lengths, counts, strict=True)]
        table = (_running_sum(counts), _ints(indices), _ints(last))
        heads = (self.arch.num_heads, self.arch.num_kv_heads, self.arch.head_size, page)
        same = {
            "sm_scale": self._scale,
            "window_left": _window_left(layer),
            "q_data_type": self.place.dtype,
            "kv_data_type": self.place.dtype,
        }
        if metadata.step.one_each:
            return self._paged_decode.planned(*table, *heads, **same)
        starts = _running_sum([chunk.num_tokens for chunk in metadata.batch.chunks])
        return self._paged_prefill.planned(starts, *table, *heads, causal=True, **same)


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> FlashInferBackend:
    """FlashInfer for `spec`; KernelUnavailableError where it has no kernel for the model."""
    if place.dtype not in (torch.bfloat16, torch.float16):
        raise KernelUnavailableError(
            f"attention backend '{spec}': FlashInfer computes bfloat16 and float16, not {place.dtype}"
        )
    if arch.head_size not in _HEAD_SIZES:
        raise KernelUnavailableError(
            f"attention backend '{spec}': FlashInfer has head sizes {_HEAD_SIZES}, the model's is {arch.head_size}"
        )
    if arch.full_attention_layers and arch.sliding_window is not None:
        raise KernelUnavailableError(
            f"attention backend '{spec}': a step is planned for one window, the layers have two"
        )
    fits = not spec.is_paged and TritonDecode.supports(arch.num_heads, arch.num_kv_heads, arch.head_size)
    return FlashInferBackend(
        arch, place, TritonDecode(arch.head_size, place.device, pdl=overlaps_launches(place.device)) if fits else None
    )


def _slot_tables(cache: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> list[range]:
    """The pages of each slot, in order."""
    pages = as_pages(cache, _SLOT_PAGE_TOKENS)
    firsts = [slot * pages.slot_step for slot in slots]
    counts = [-(-length // _SLOT_PAGE_TOKENS) for length in lengths]
    step = pages.page_step
    return [range(first, first + count * step, step) for first, count in zip(firsts, counts, strict=True)]


def _window_left(layer: CacheLayer) -> int:
    return -1 if layer.window is None else layer.window - 1


def _running_sum(counts: Sequence[int]) -> Tensor:
    return torch.nn.functional.pad(_ints(counts).cumsum(0, dtype=torch.int32), (1, 0))


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
