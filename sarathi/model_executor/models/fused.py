"""The decoder's step by fused kernels, on the same weights; knows no family's name, no files, no memory policy.

Decoder is its plain twin. Here queries and keys reach the backend as projected: it turns them on its way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.models.decoder import Decoder, DecoderLayer
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.ops.types import NewTokens, RotationTable


class FusedDecoder:
    """Safe to capture in a CUDA graph where the backend is."""

    def __init__(
        self, decoder: Decoder, arch: ModelArchitecture, kernels: Ops, backend: AttentionBackend, max_positions: int
    ) -> None:
        self.decoder, self.kernels, self.backend = decoder, kernels, backend
        self._heads = [arch.num_heads, arch.num_kv_heads, arch.num_kv_heads]
        self._head_size, self._eps = arch.head_size, arch.rms_norm_eps
        self._table = _rotation_table(decoder, max_positions)

    @staticmethod
    def supports(arch: ModelArchitecture) -> bool:
        """Whether the fused kernels cover all that the architecture has."""
        return not (arch.o_bias or arch.mlp_bias)

    def embed(self, token_ids: Tensor, newest: Tensor) -> Tensor:
        """token_ids: [T] integers, stand-ins for `newest` [homes] among them -> [T, hidden_size], the first stream."""
        return self.kernels.embed(token_ids, newest, self.decoder.embedding.weight)

    def __call__(self, stream: Tensor, positions: Tensor, cache: Sequence[CacheLayer], metadata: Metadata) -> Tensor:
        """stream: [T, hidden_size], overwritten; positions: [T] integers -> the stream behind the last layer."""
        for layer, kept in zip(self.decoder.layers, cache, strict=True):
            self._layer(stream, positions, layer, kept, metadata)
        return stream

    def logits(self, stream: Tensor, out: Tensor | None = None) -> Tensor:
        """stream: [S, hidden_size], of the rows that are asked for -> [S, vocab_size]: `out` where it is given."""
        normed = self.kernels.rms_norm(stream, self.decoder.norm.weight, self._eps)
        return self.kernels.linear(normed, self.decoder.head.weight, out=out)

    def _layer(
        self, stream: Tensor, positions: Tensor, layer: DecoderLayer, kept: CacheLayer, metadata: Metadata
    ) -> None:
        kernels, attention, feed_forward = self.kernels, layer.attention, layer.feed_forward
        normed = kernels.rms_norm(stream, layer.input_norm.weight, self._eps)
        qkv = kernels.linear(normed, attention.qkv.weight, attention.qkv.bias)
        heads = qkv.view(stream.shape[0], sum(self._heads), self._head_size)
        query, key, value = torch.split(heads, self._heads, dim=1)
        if attention.head_norm is not None:
            weight = attention.head_norm.weight
            query = kernels.rms_norm(query.contiguous(), weight[0], self._eps)
            key = kernels.rms_norm(key.contiguous(), weight[1], self._eps)
        new = NewTokens(key, value, self._table)
        seen = self.backend.append_and_attend(query, new, positions, kept, metadata)
        kernels.linear_add(seen.view(stream.shape[0], -1), attention.output.weight, stream)
        normed = kernels.rms_norm(stream, layer.post_norm.weight, self._eps)
        kernels.linear_add(kernels.gated_linear(normed, feed_forward.gate_up.weight), feed_forward.down.weight, stream)


def _rotation_table(decoder: Decoder, max_positions: int) -> RotationTable:
    return RotationTable(*decoder.rotary.frequencies.table(max_positions))
