"""Attention by FlashInfer (Ye et al., 2025), on blocks and on slots.

    step                              blocks                    slots
    one new token per sequence        paged decode              our split-KV kernel, or paged decode over the slots
    decodes, then one chunk           paged prefill             decode as above, then the single-sequence prefill
    anything else                     paged prefill             paged prefill over the slots

A paged kernel over slots takes consecutive pages and an arithmetic block table: no byte moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flashinfer
import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer
from sarathi.model_executor.attention.base import Capabilities, KernelUnavailableError
from sarathi.model_executor.attention.flash_attn.triton_decode import TritonDecode
from sarathi.model_executor.attention.gpu_backend import GpuBackend, decode_kernel
from sarathi.model_executor.attention.metadata import StepMetadata, first_decodes
from sarathi.model_executor.attention.slot_pages import as_pages, fits_block_table
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.placement import Placement

_SCRATCH_BYTES = 512 * 2**20
_SLOT_PAGE_TOKENS = 64  # page size of slots passed as pages
_MAX_SINGLE_ELEMENTS = 2**32  # before Hopper the single-sequence prefill computes its offsets in uint32
_HEAD_SIZES = (64, 128, 256)


@dataclass(slots=True)
class FlashInferMetadata(StepMetadata):
    """A step, and the paged kernel planned for it by the first layer and run by all."""

    batch: Batch
    address: Address
    leading_decodes: int
    wrapper: Any = None


class _Paged:
    """A paged kernel, planned for each step while the device may still run the previous one.

    The wrapper copies a plan to the device from one pinned buffer, which the next plan must not overwrite before the
    copy has finished.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def planned(self, *arguments: Any, **options: Any) -> Any:
        """Plan the step. Returns the wrapper, to be run on each layer."""
        self._copied.synchronize()
        self._wrapper.plan(*arguments, **options)
        self._copied.record()
        return self._wrapper


class FlashInferBackend(GpuBackend):
    """FlashInfer's kernels for one model."""

    capabilities = Capabilities(over_read_tokens=255)  # the single-sequence prefill copies whole tiles of keys

    def __init__(self, arch: ModelArchitecture, place: Placement, decode: TritonDecode | None = None) -> None:
        """decode: attends decodes on slots; None: FlashInfer's paged kernel does."""
        super().__init__(arch, place, decode, fewest=1)
        self._has_wide_offsets = torch.cuda.get_device_capability(place.device)[0] == 9
        self._scale = arch.head_size**-0.5
        scratch = torch.zeros(_SCRATCH_BYTES, dtype=torch.uint8, device=place.device)
        self._paged_decode = _Paged(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
        )
        self._paged_prefill = _Paged(flashinfer.BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD"))

    def plan(self, batch: Batch, address: Address) -> FlashInferMetadata:
        """See AttentionBackend. A paged kernel is planned by the first layer, which knows the strides of the cache."""
        step = self._make_step(batch, address)
        return FlashInferMetadata(step, batch, address, batch.leading_decodes)

    def attend(
        self, query: Tensor, layer: CacheLayer, metadata: FlashInferMetadata, out: Tensor | None = None
    ) -> Tensor:
        """See GpuBackend."""
        attended = self._attend(query, layer, metadata)
        return attended if out is None else out.copy_(attended)

    def _attend(self, query: Tensor, layer: CacheLayer, metadata: FlashInferMetadata) -> Tensor:
        chunks, decodes = metadata.batch.chunks, metadata.leading_decodes
        if isinstance(metadata.address, BlockAddress):
            return self._run_paged(query, layer, (layer.k, layer.v), metadata)
        if self._decode is not None and metadata.step.is_decode:
            return self._decode.attend(query, layer, metadata.step)
        is_one_chunk = decodes == len(chunks) - 1 and (self._decode is not None or not decodes)
        if is_one_chunk and self._single_reaches(layer, chunks[-1].start + chunks[-1].num_tokens):
            return self._decodes_then_chunk(query, layer, metadata, metadata.address.slots[-1])
        if not fits_block_table(layer.k, _SLOT_PAGE_TOKENS):
            return self._one_by_one(query, layer, chunks, metadata.address.slots)
        pages = as_pages(layer.k, _SLOT_PAGE_TOKENS).pages, as_pages(layer.v, _SLOT_PAGE_TOKENS).pages
        return self._run_paged(query, layer, pages, metadata)

    def _single_reaches(self, layer: CacheLayer, length: int) -> bool:
        """Whether the single-sequence prefill can address this many tokens of a slot."""
        return self._has_wide_offsets or length * layer.k.stride(1) < _MAX_SINGLE_ELEMENTS

    def _decodes_then_chunk(self, query: Tensor, layer: CacheLayer, metadata: FlashInferMetadata, slot: int) -> Tensor:
        decodes, chunk = metadata.leading_decodes, metadata.batch.chunks[-1]
        prefilled = self._prefill_slot(query[decodes:], layer, slot, chunk.start + chunk.num_tokens)
        if self._decode is None or decodes == 0:
            return prefilled
        decoded = self._decode.attend(query[:decodes], layer, first_decodes(metadata.step, decodes))
        return torch.cat((decoded, prefilled))

    def _one_by_one(self, query: Tensor, layer: CacheLayer, chunks: Sequence[Chunk], slots: Sequence[int]) -> Tensor:
        """Each sequence by the single-sequence prefill, for caches with more pages than a block table can index."""
        queries = torch.split(query, [chunk.num_tokens for chunk in chunks])
        return torch.cat(
            [
                self._prefill_slot(part, layer, slot, chunk.start + chunk.num_tokens)
                for part, chunk, slot in zip(queries, chunks, slots, strict=True)
            ]
        )

    def _prefill_slot(self, query: Tensor, layer: CacheLayer, slot: int, length: int) -> Tensor:
        """query: [n, num_heads, head_size], the last of the slot's first `length` tokens."""
        out: Tensor = flashinfer.single_prefill_with_kv_cache(
            query,
            layer.k[slot, :length],
            layer.v[slot, :length],
            causal=True,
            sm_scale=self._scale,
            window_left=_window_left(layer),
        )
        return out

    def _run_paged(
        self, query: Tensor, layer: CacheLayer, pages: tuple[Tensor, Tensor], metadata: FlashInferMetadata
    ) -> Tensor:
        """pages: keys and values, [pages, page_tokens, num_kv_heads, head_size]."""
        if metadata.wrapper is None:
            metadata.wrapper = self._planned(layer, metadata)
        out: Tensor = metadata.wrapper.run(query, pages)
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
        if metadata.step.is_decode:
            return self._paged_decode.planned(*table, *heads, **same)
        starts = _running_sum([chunk.num_tokens for chunk in metadata.batch.chunks])
        return self._paged_prefill.planned(starts, *table, *heads, causal=True, **same)


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> FlashInferBackend:
    """FlashInfer for `spec`. Raises KernelUnavailableError if it has no kernel for the model."""
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
            f"attention backend '{spec}': a step is planned for one window size, and the layers have two"
        )
    return FlashInferBackend(arch, place, None if spec.is_paged else decode_kernel(arch, place))


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
