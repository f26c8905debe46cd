"""Attention by torch alone, on any device: the default on CPUs and the reference elsewhere; knows no memory policy.

The functions have FlashAttention's own names, arguments and meaning, so that tests compare them argument for argument.
On virtual memory K and V are read where they lie; with a block table the blocks are gathered first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import AttentionBackend, Capabilities
from sarathi.model_executor.attention.sdpa.span import UNLIMITED, Window
from sarathi.model_executor.attention.sdpa.view import Part, View, make_view, write_index
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops.types import NewTokens, RotationTable
from sarathi.model_executor.placement import Placement


@dataclass(slots=True)
class SdpaMetadata:
    """Where the step's T tokens are written, [T] int64 each, one view for each window of the model, and the rotation.

    cos, sin: [T, 1, head_size] in the model's dtype, gathered by the first layer; the first half of sin is negated.
    """

    rows: Tensor
    cols: Tensor
    views: Mapping[int | None, View]
    rotation: tuple[Tensor, Tensor] | None = None


class SdpaBackend(AttentionBackend):
    """torch's scaled_dot_product_attention, one call for each sequence of a layer."""

    capabilities = Capabilities()

    def __init__(self, arch: ModelArchitecture, place: Placement) -> None:
        self.scale = arch.head_size**-0.5
        self.windows = {arch.window_of(layer): _causal(arch.window_of(layer)) for layer in range(arch.num_layers)}
        self.place = place

    def plan(self, batch: Batch, address: Address) -> SdpaMetadata:
        """Masks are made here in the model's dtype, so that no layer converts one."""
        parts = [Part(chunk.num_tokens, chunk.start + chunk.num_tokens) for chunk in batch.chunks]
        views = {kept: make_view(parts, address, window, self.place) for kept, window in self.windows.items()}
        return SdpaMetadata(*write_index(parts, address, self.place.device), views)

    def attend(self, query: Tensor, layer: CacheLayer, metadata: SdpaMetadata) -> Tensor:
        """See AttentionBackend."""
        return metadata.views[layer.window].attend(query, layer.k, layer.v, self.scale)

    def rope_and_store(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: SdpaMetadata
    ) -> None:
        """See AttentionBackend. The factors are gathered once a step, and rounded to the model's dtype."""
        if metadata.rotation is None:
            metadata.rotation = _rotation(new.table, positions, query.dtype)
        for heads in _joined(query, new.keys):
            _rotate(heads, *metadata.rotation)
        self.store(new.keys, new.values, layer, metadata)

    def store(self, key: Tensor, value: Tensor, layer: CacheLayer, metadata: SdpaMetadata) -> None:
        """See AttentionBackend."""
        index = (metadata.rows, metadata.cols)
        layer.k.index_put_(index, key)
        layer.v.index_put_(index, value)


def _rotation(table: RotationTable, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See SdpaMetadata."""
    cos, sin = table.cos[positions].to(dtype), table.sin[positions].to(dtype)  # [T, head_size / 2]
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """heads: [T, heads, head_size], overwritten."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(swapped, sin)


def _joined(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Both as one tensor where they are neighbours in the product that made them: half as many operations."""
    tokens, heads, size = query.shape
    strides, offset = query.stride(), query.storage_offset()
    is_next = key.storage_offset() == offset + heads * size and strides[1:] == (size, 1) and key.stride() == strides
    if is_next and key.untyped_storage().data_ptr() == query.untyped_storage().data_ptr():
        return (query.as_strided((tokens, heads + key.shape[1], size), strides, offset),)
    return query, key


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> SdpaBackend:
    """Every architecture, memory and device will do."""
    return SdpaBackend(arch, place)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
) -> Tensor:
    """Appends k and v to the cache behind cache_seqlens tokens, in place, then attends; FlashAttention 2.8's function.

    q: [B, Sq, Hq, D]; k, v: [B, Snew, Hkv, D]; k_cache, v_cache: [rows, cols, Hkv, D], row = cache_batch_idx[b] or b,
    or [blocks, block_size, Hkv, D] with block_table [B, N] int32. cache_seqlens: [B] int32 -> [B, Sq, Hq, D].
    """
    place = Placement(q.dtype, q.device)
    lengths = cache_seqlens.tolist()
    address = _address(len(lengths), k_cache, cache_batch_idx, block_table)
    if k is not None and v is not None:
        lengths = [length + k.shape[1] for length in lengths]
        index = write_index([Part(k.shape[1], length) for length in lengths], address, q.device)
        k_cache.index_put_(index, k.flatten(0, 1))
        v_cache.index_put_(index, v.flatten(0, 1))
    view = make_view([Part(q.shape[1], length) for length in lengths], address, _window(causal, window_size), place)
    return view.attend(q.flatten(0, 1), k_cache, v_cache, _scale(q, softmax_scale)).view_as(q)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    block_table: Tensor | None = None,
) -> Tensor:
    """Sequences of different lengths one after the other; FlashAttention's function of this name.

    q: [Tq, Hq, D]; k, v: [Tk, Hkv, D], or [blocks, block_size, Hkv, D] with block_table [B, N] int32;
    cu_seqlens_*: [B + 1] int32, first 0 -> [Tq, Hq, D].
    """
    starts = cu_seqlens_k.tolist()
    parts = [
        Part(q1 - q0, k1 - k0)
        for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(starts), strict=True)
    ]
    window, place = _window(causal, window_size), Placement(q.dtype, q.device)
    if block_table is None:
        view = make_view(parts, SlotAddress((0,) * len(parts)), window, place).shifted(starts)
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    else:
        view = make_view(parts, _address(len(parts), k, None, block_table), window, place)
    return view.attend(q, k, v, _scale(q, softmax_scale))


def _causal(kept: int | None) -> Window:
    """A window of n tokens counts the query's own."""
    return Window(UNLIMITED if kept is None else kept - 1, 0)


def _window(causal: bool, window_size: Sequence[int]) -> Window:
    left, right = window_size
    return Window(left, 0) if causal else Window(left, right)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _address(batch_size: int, cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None) -> Address:
    if block_table is not None:
        return BlockAddress(tuple(block_table.tolist()), cache.shape[1])
    return SlotAddress(tuple(range(batch_size) if cache_batch_idx is None else cache_batch_idx.tolist()))
