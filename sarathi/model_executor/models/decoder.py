"""The decoder of every supported family: embedding, layers, head."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.layers import Attention, AttentionStep, Embedding, GatedMLP, Linear, RMSNorm
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.placement import Placement
from sarathi.model_executor.rope import RopeFrequencies

_CPU_ROPE_POSITIONS = 4096  # in a CPU's table from the start; more by need


class DecoderLayer:
    """Attention, then the feed-forward layer; each reads the normalised residual stream and adds its output to it."""

    def __init__(self, arch: ModelArchitecture, place: Placement, ops: Ops, backend: AttentionBackend) -> None:
        self.input_norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps, place, ops)
        self.attention = Attention(arch, place, ops, backend)
        self.post_norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps, place, ops)
        self.mlp = GatedMLP(arch, place, ops)

    def __call__(self, stream: Tensor, step: AttentionStep, layer: CacheLayer) -> None:
        """stream: [T, hidden_size], overwritten; the cache layer holds the tokens' keys and values afterwards."""
        self.attention.add_to(self.input_norm(stream), stream, step, layer)
        self.mlp.add_to(self.post_norm(stream), stream)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}input_layernorm.weight", self.input_norm.weight
        yield f"{prefix}post_attention_layernorm.weight", self.post_norm.weight
        yield from self.attention.parameters(f"{prefix}self_attn.")
        yield from self.mlp.parameters(f"{prefix}mlp.")

    def pack(self) -> None:
        self.attention.pack()
        self.mlp.pack()


class Decoder:
    """From tokens to logits, on every device: only the operations and the attention backend differ.

    pass_on: takes the residual stream, [T, hidden_size], if another rank has norm and head; else None.
    vocab_size: 0 if another rank has norm and head.
    """

    def __init__(
        self, arch: ModelArchitecture, place: Placement, ops: Ops, backend: AttentionBackend, max_positions: int
    ) -> None:
        """max_positions: tokens of the longest sequence."""
        self.place, self.ops, self.vocab_size = place, ops, arch.vocab_size
        self.tie_embeddings, self._max_positions = arch.tie_embeddings, max_positions
        self.frequencies = RopeFrequencies(arch.rope, arch.head_size, place.device)
        exceeds = arch.rope.depends_on_length and max_positions > arch.rope.original_max_positions
        self.needs_rope_lengths = exceeds and place.device.type == "cpu"
        few = 0 if self.needs_rope_lengths else min(max_positions, _CPU_ROPE_POSITIONS)
        self._rope_table = self.frequencies.table(few if place.device.type == "cpu" else max_positions)
        self.embedding = Embedding(arch.vocab_size, arch.hidden_size, place, ops)
        self.layers = [DecoderLayer(arch, place, ops, backend) for _ in range(arch.num_layers)]
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps, place, ops)
        self.head = self._make_head(arch)
        self.pass_on: Callable[[Tensor], None] | None = None

    def __call__(
        self, batch: Batch, cache: Sequence[CacheLayer], metadata: Metadata,
        last_tokens: Tensor | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run T tokens -> logits [S, vocab_size] at the batch's sample indices; keys and values of all T are stored.

        last_tokens: [slots] int64, the values of the batch's placeholder tokens. out: contiguous tensor for the logits.
        Safe to capture in a CUDA graph with metadata of the backend's `plan_static`.
        """
        return self.logits(self.run_layers(batch, cache, metadata, last_tokens), batch.sample_indices, out)

    def run_layers(
        self, batch: Batch, cache: Sequence[CacheLayer], metadata: Metadata, last_tokens: Tensor | None = None
    ) -> Tensor:
        """The first part of a run: the residual stream after the last layer, [T, hidden_size]."""
        stream = self.embedding(batch.token_ids, last_tokens)
        step = self._attention_step(batch, metadata)
        for layer, kept in zip(self.layers, cache, strict=True):
            layer(stream, step, kept)
        return stream

    def logits(self, stream: Tensor, indices: Tensor | slice | None, out: Tensor | None = None) -> Tensor:
        """The last part: logits of these tokens of the stream (None: all), or the stream is passed on."""
        if self.pass_on is not None:
            self.pass_on(stream)
            return stream.new_empty(0, 1)
        if indices is not None:
            stream = stream[indices]
        return self.head(self.norm(stream), out)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its name in Hugging Face checkpoints; views, so that filling them fills the model."""
        yield "model.embed_tokens.weight", self.embedding.weight
        for index, layer in enumerate(self.layers):
            yield from layer.parameters(f"model.layers.{index}.")
        yield "model.norm.weight", self.norm.weight
        if not self.tie_embeddings:
            yield from self.head.parameters("")

    def pack(self) -> None:
        """Call once, when the weights are filled: changes them to the device's fastest layout."""
        for layer in self.layers:
            layer.pack()
        if self.vocab_size:
            self.head.pack()

    def _attention_step(self, batch: Batch, metadata: Metadata) -> AttentionStep:
        """RoPE factors are in a table by position, or if they depend on lengths, in one made for this step."""
        if self.needs_rope_lengths:
            table = self.frequencies.cos_sin(batch.positions, batch.rope_lengths)
            return AttentionStep(table, torch.arange(len(batch.positions), device=self.place.device), metadata)
        num_positions = max([chunk.start + chunk.num_tokens for chunk in batch.chunks], default=0)
        if num_positions > len(self._rope_table.cos):
            self._grow_rope_table(num_positions)
        return AttentionStep(self._rope_table, batch.positions, metadata)

    def _grow_rope_table(self, num_positions: int) -> None:
        """CPUs only: max_positions may be huge. On a GPU the table never moves, since graphs contain its address."""
        doubled = min(2 * len(self._rope_table.cos), self._max_positions)
        self._rope_table = self.frequencies.table(max(num_positions, doubled))

    def _make_head(self, arch: ModelArchitecture) -> Linear:
        if arch.tie_embeddings:
            return Linear.tied_to(self.embedding, "lm_head", self.place, self.ops)
        return Linear(arch.hidden_size, {"lm_head": arch.vocab_size}, bias=False, place=self.place, ops=self.ops)
