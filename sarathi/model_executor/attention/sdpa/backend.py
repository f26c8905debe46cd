"""Attention by torch alone, on any device: the default on CPUs, and the reference elsewhere.

On virtual memory keys and values are read in place; blocks are gathered first. The functions at the end have the names,
arguments and meaning of FlashAttention's, so that tests compare them argument for argument.
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
from sarathi.model_executor.attention.sdpa.view import UNLIMITED, Lengths, View, Window, make_view, write_index
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.ops.types import NewTokens
from sarathi.model_executor.placement import Placement


@dataclass(slots=True)
class SdpaMetadata:
    """What the layers of a step share.

    index: slot (or block) and column of each new token, [T] int64 each. views: one for each window of the model.
    cos, sin: [T, 1, head_size] in the model's dtype, computed by the first layer; the first half of sin is negated.
    """

    index: tuple[Tensor, Tensor]
    views: Mapping[int | None, View]
    cos: Tensor | None = None
    sin: Tensor | None = None


class SdpaBackend(AttentionBackend):
    """torch's scaled_dot_product_attention, one call for each sequence of a layer."""

    capabilities = Capabilities()

    def __init__(self, arch: ModelArchitecture, place: Placement) -> None:
        self._scale = arch.head_size**-0.5
        self._windows = {arch.window_of(layer): _causal(arch.window_of(layer)) for layer in range(arch.num_layers)}
        self._place = place

    def plan(self, batch: Batch, address: Address) -> SdpaMetadata:
        """See AttentionBackend."""
        lengths = [Lengths(chunk.num_tokens, chunk.start + chunk.num_tokens) for chunk in batch.chunks]
        views = {size: make_view(lengths, address, window, self._place) for size, window in self._windows.items()}
        return SdpaMetadata(write_index(lengths, address, self._place.device), views)

    def rope_and_store(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: SdpaMetadata
    ) -> None:
        """See AttentionBackend. Cosines and sines are looked up once per step and rounded to the model's dtype."""
        if metadata.cos is None or metadata.sin is None:
            cos, sin = (factors[positions].to(query.dtype) for factors in new.table)  # [T, head_size / 2]
            metadata.cos = torch.cat((cos, cos), -1).unsqueeze(1)
            metadata.sin = torch.cat((-sin, sin), -1).unsqueeze(1)
        for heads in _joined(query, new.keys):
            swapped = heads.roll(heads.shape[-1] // 2, -1)
            heads.mul_(metadata.cos).addcmul_(swapped, metadata.sin)
        self.store(new.keys, new.values, layer, metadata)

    def store(self, key: Tensor, value: Tensor, layer: CacheLayer, metadata: SdpaMetadata) -> None:
        """Write the step's rotated keys and its values to the cache."""
        layer.k.index_put_(metadata.index, key)
        layer.v.index_put_(metadata.index, value)

    def attend(self, query: Tensor, layer: CacheLayer, metadata: SdpaMetadata) -> Tensor:
        """See AttentionBackend."""
        return metadata.views[layer.window].attend(query, layer.k, layer.v, self._scale)


def _joined(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys as one tensor if they are adjacent in memory: half the operations."""
    tokens, heads, size = query.shape
    strides, num_bytes = query.stride(), heads * size * query.element_size()
    is_next = strides[1:] == (size, 1) and key.stride() == strides
    if is_next and key.data_ptr() == query.data_ptr() + num_bytes:
        return (query.as_strided((tokens, heads + key.shape[1], size), strides),)
    return query, key


def create(spec: BackendSpec, arch: ModelArchitecture, place: Placement) -> SdpaBackend:
    """For every architecture, memory and device."""
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
    """Store k and v behind the cache_seqlens tokens of the cache, in place, then attend: FlashAttention 2.8's function.

    q: [B, Sq, Hq, D]; k, v: [B, Snew, Hkv, D]; k_cache, v_cache: [slots, tokens, Hkv, D], sequence b in slot
    cache_batch_idx[b] or b, or [blocks, block_size, Hkv, D] with block_table [B, N] int32. cache_seqlens: [B] int32.
    Returns [B, Sq, Hq, D].
    """
    place = Placement(q.dtype, q.device)
    lengths = cache_seqlens.tolist()
    address = _address(len(lengths), k_cache, cache_batch_idx, block_table)
    if k is not None and v is not None:
        lengths = [length + k.shape[1] for length in lengths]
        index = write_index([Lengths(k.shape[1], length) for length in lengths], address, q.device)
        k_cache.index_put_(index, k.flatten(0, 1))
        v_cache.index_put_(index, v.flatten(0, 1))
    new = [Lengths(q.shape[1], length) for length in lengths]
    view = make_view(new, address, _window(causal, window_size), place)
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
    """Attention of concatenated sequences of different lengths: FlashAttention's function of this name.

    q: [Tq, Hq, D]; k, v: [Tk, Hkv, D], or [blocks, block_size, Hkv, D] with block_table [B, N] int32;
    cu_seqlens_*: [B + 1] int32, first 0. Returns [Tq, Hq, D].
    """
    starts = cu_seqlens_k.tolist()
    lengths = [
        Lengths(q1 - q0, k1 - k0)
        for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(starts), strict=True)
    ]
    window, place = _window(causal, window_size), Placement(q.dtype, q.device)
    if block_table is None:
        view = make_view(lengths, SlotAddress((0,) * len(lengths)), window, place).shifted(starts)
        k, v = k.unsqueeze(0), v.unsqueeze(0)
    else:
        view = make_view(lengths, _address(len(lengths), k, None, block_table), window, place)
    return view.attend(q, k, v, _scale(q, softmax_scale))


def _causal(size: int | None) -> Window:
    """A sliding window of `size` tokens includes the query's own."""
    return Window(UNLIMITED if size is None else size - 1, 0)


def _window(causal: bool, window_size: Sequence[int]) -> Window:
    left, right = window_size
    return Window(left, 0) if causal else Window(left, right)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _address(batch_size: int, cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None) -> Address:
    if block_table is not None:
        return BlockAddress(tuple(block_table.tolist()), cache.shape[1])
    return SlotAddress(tuple(range(batch_size) if cache_batch_idx is None else cache_batch_idx.tolist()))
