"""The one decoder of the Llama family: embedding, layers, head; knows no family's name, no files, no memory policy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.layers.activation import silu_and_multiply
from sarathi.model_executor.layers.embedding import Embedding
from sarathi.model_executor.layers.linear import Linear
from sarathi.model_executor.layers.rms_norm import RMSNorm
from sarathi.model_executor.layers.rotary import RopeTable, RotaryEmbedding, rotate
from sarathi.model_executor.placement import Placement


def _linear(place: Placement, in_features: int, bias: bool, **parts: int) -> Linear:
    return Linear(in_features, parts, bias=bias, place=place)


def _norm(place: Placement, arch: ModelArchitecture) -> RMSNorm:
    return RMSNorm(arch.hidden_size, arch.rms_norm_eps, place)


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of one step share."""

    rope: RopeTable
    metadata: Metadata


class HeadNorm:
    """Qwen 3's normalisation of every query and key head, in one pass over both."""

    def __init__(self, arch: ModelArchitecture, place: Placement) -> None:
        self.eps = arch.rms_norm_eps
        self.weight = torch.empty(2, arch.head_size, dtype=place.dtype, device=place.device)  # query's, key's
        row_of_head = [0] * arch.num_heads + [1] * arch.num_kv_heads
        self.row_of_head = torch.tensor(row_of_head, device=place.device)

    def __call__(self, heads: Tensor) -> Tensor:
        """heads: [T, num_heads + num_kv_heads, D] -> the same shape."""
        return F.rms_norm(heads, heads.shape[-1:], None, self.eps) * self.weight[self.row_of_head]

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}q_norm.weight", self.weight[0]
        yield f"{prefix}k_norm.weight", self.weight[1]


class Attention:
    """Projections around the attention kernel; query and key are turned together."""

    def __init__(self, arch: ModelArchitecture, place: Placement, backend: AttentionBackend) -> None:
        query, key, value = arch.qkv_sizes
        self.qkv = _linear(place, arch.hidden_size, arch.qkv_bias, q_proj=query, k_proj=key, v_proj=value)
        self.output = _linear(place, query, arch.o_bias, o_proj=arch.hidden_size)
        self.head_norm = HeadNorm(arch, place) if arch.qk_norm else None
        self.head_shape = (-1, arch.num_heads + 2 * arch.num_kv_heads, arch.head_size)
        self.num_heads, self.num_kv_heads = arch.num_heads, arch.num_kv_heads
        self.rotate, self.backend = rotate, backend

    def __call__(self, x: Tensor, context: StepContext, layer: CacheLayer) -> Tensor:
        """x: [T, hidden_size] -> [T, hidden_size]; the cache holds the tokens' K and V afterwards."""
        heads = self.qkv(x).view(self.head_shape)  # [T, q + k + v heads, D]
        turned, value = torch.split(heads, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.head_norm is not None:
            turned = self.head_norm(turned)
        query, key = torch.split(self.rotate(turned, context.rope), [self.num_heads, self.num_kv_heads], dim=1)
        seen = self.backend.forward(query, key, value, layer, context.metadata)  # [T, num_heads, D]
        return self.output(seen.reshape(x.shape[0], -1))

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for part in (self.qkv, self.output, self.head_norm):
            if part is not None:
                yield from part.parameters(prefix)

    def pack(self) -> None:
        self.qkv.pack()
        self.output.pack()


class FeedForward:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, arch: ModelArchitecture, place: Placement) -> None:
        inner = arch.intermediate_size
        self.gate_up = _linear(place, arch.hidden_size, arch.mlp_bias, gate_proj=inner, up_proj=inner)
        self.down = _linear(place, inner, arch.mlp_bias, down_proj=arch.hidden_size)
        self.activate = silu_and_multiply

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden_size] -> [T, hidden_size]."""
        return self.down(self.activate(self.gate_up(x)))

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield from self.gate_up.parameters(prefix)
        yield from self.down.parameters(prefix)

    def pack(self) -> None:
        self.gate_up.pack()
        self.down.pack()


class DecoderLayer:
    """Attention, then the feed-forward layer, each on the normalised residual sum."""

    def __init__(self, arch: ModelArchitecture, place: Placement, backend: AttentionBackend) -> None:
        self.input_norm = _norm(place, arch)
        self.attention = Attention(arch, place, backend)
        self.post_norm = _norm(place, arch)
        self.feed_forward = FeedForward(arch, place)

    def __call__(self, x: Tensor, residual: Tensor, context: StepContext, layer: CacheLayer) -> Tensor:
        """x: what the layer before adds to `residual`, both [T, hidden_size]; returns what this one adds."""
        x = self.attention(self.input_norm.add(x, residual), context, layer)
        return self.feed_forward(self.post_norm.add(x, residual))

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}input_layernorm.weight", self.input_norm.weight
        yield f"{prefix}post_attention_layernorm.weight", self.post_norm.weight
        yield from self.attention.parameters(f"{prefix}self_attn.")
        yield from self.feed_forward.parameters(f"{prefix}mlp.")

    def pack(self) -> None:
        self.attention.pack()
        self.feed_forward.pack()


class Decoder:
    """Tokens in, logits of the sampled rows out."""

    def __init__(self, arch: ModelArchitecture, place: Placement, backend: AttentionBackend) -> None:
        self.tie_embeddings = arch.tie_embeddings
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size, place)
        self.rotary = RotaryEmbedding(arch.rope, arch.head_size, place)
        self.layers = [DecoderLayer(arch, place, backend) for _ in range(arch.num_layers)]
        self.norm = _norm(place, arch)
        self.head = self._make_head(arch, place)

    def __call__(self, batch: Batch, cache: Sequence[CacheLayer], metadata: Metadata) -> Tensor:
        """The step over T tokens -> logits [S, vocab_size] of the batch's sampled rows; K and V of all T are stored."""
        context = StepContext(self.rotary.table(batch.positions, batch.rope_lengths), metadata)
        x = self.embedding(batch.token_ids)  # [T, hidden_size]
        residual = torch.zeros_like(x)
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, residual, context, kept)
        if batch.sampled_rows is not None:
            x, residual = x[batch.sampled_rows], residual[batch.sampled_rows]
        return self.head(self.norm.add(x, residual))

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its name in Hugging Face checkpoints; views, so that filling them fills the model."""
        yield "model.embed_tokens.weight", self.embedding.weight
        for index, layer in enumerate(self.layers):
            yield from layer.parameters(f"model.layers.{index}.")
        yield "model.norm.weight", self.norm.weight
        if not self.tie_embeddings:
            yield from self.head.parameters("")

    def pack(self) -> None:
        """Called once when the weights are in: brings them into the device's fastest layout."""
        for layer in self.layers:
            layer.pack()
        self.head.pack()

    def _make_head(self, arch: ModelArchitecture, place: Placement) -> Linear:
        if not arch.tie_embeddings:
            return _linear(place, arch.hidden_size, False, lm_head=arch.vocab_size)
        return Linear.over(self.embedding.weight)
