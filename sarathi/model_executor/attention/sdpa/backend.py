"""Attention by torch alone, on any device: the default on CPUs and the reference elsewhere; knows no memory policy.

The functions have FlashAttention's own names, arguments and meaning, so that tests compare them argument for argument.
On virtual memory K and V are read where they lie; with a block table the blocks are gathered first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from sarathi.config.backend import BackendSpec
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import Address, BlockAddress, CacheLayer, SlotAddress
from sarathi.model_executor.attention.sdpa.span import UNLIMITED, Window
from sarathi.model_executor.attention.sdpa.view import Part, View, make_view, write_index
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.placement import Placement


@dataclass(frozen=True, slots=True)
class SdpaMetadata:
    """Where the step's T tokens are written, rows and cols [T] int64, and one view for each window of the model."""

    rows: Tensor
    cols: Tensor
    views: Mapping[int | None, View]


class SdpaBackend:
    """torch's scaled_dot_product_attention, one call for each sequence of a layer."""

    def __init__(self, arch: ModelArchitecture, place: Placement) -> None:
        self.scale = arch.head_size**-0.5
        self.windows = {arch.window_of(layer): _causal(arch.window_of(layer)) for layer in range(arch.num_layers)}
        self.place = place

    def plan(self, batch: Batch, address: Address) -> SdpaMetadata:
        """Masks are made here in the model's dtype, so that no layer converts one."""
        parts = [Part(chunk.num_tokens, chunk.start + chunk.num_tokens) for chunk in batch.chunks]
        views = {kept: make_view(parts, address, window, self.place) for kept, window in self.windows.items()}
        return SdpaMetadata(*write_index(parts, address, self.place.device), views)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layer: CacheLayer, metadata: SdpaMetadata) -> Tensor:
        """Stores the new K and V, then attends; see AttentionBackend."""
        self.store(key, value, layer, metadata)
        return metadata.views[layer.window].attend(query, layer.k, layer.v, self.scale)

    def store(self, key: Tensor, value: Tensor, layer: CacheLayer, metadata: SdpaMetadata) -> None:
        """key, value: [T, num_kv_heads, head_size], the step's."""
        index = (metadata.rows, metadata.cols)
        layer.k.index_put_(index, key)
        layer.v.index_put_(index, value)


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
