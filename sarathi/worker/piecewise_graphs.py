"""Steps of few tokens, prompts among them, as CUDA graphs between the layers' calls of attention.

Attention depends on the lengths of a step's sequences, so that a library divides its work anew for each step; all else
depends on the number of tokens alone. A step of hundreds of tokens takes the device less time than starting each of its
kernels takes the host: here a layer is one graph and one call.

    graph 0   embedding, norm, q k v of layer 0, RoPE, store          call 0   attention of layer 0
    graph i   output, MLP of layer i - 1, norm ... store of layer i   call i   attention of layer i
    graph L   output, MLP of the last layer
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.address import CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend, Metadata
from sarathi.model_executor.attention.gpu_backend import GpuBackend
from sarathi.model_executor.attention.metadata import StepMetadata
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.models.layers import AttentionFunction
from sarathi.model_executor.ops.types import CacheTarget, NewTokens
from sarathi.model_executor.placement import Placement

# Numbers of tokens. From 512 on a step takes the device about as long as its launches take the host.
_SIZES = (8, 16, 32, 48, 64, 96, 128, *range(160, 513, 32))


class StepBuffers(NamedTuple):
    """What graphs and calls of attention pass to each other, for T tokens: tensors that stay in place."""

    token_ids: Tensor  # [T] int32, placeholder tokens among them
    positions: Tensor  # [T] int32
    rows: Tensor  # [T] int32, each token's slot or block; -1: it is not stored
    columns: Tensor  # [T] int32, its place there
    query: Tensor  # [T, num_heads, head_size]
    attended: Tensor  # [T, num_heads, head_size]

    @classmethod
    def create(cls, num_tokens: int, arch: ModelArchitecture, place: Placement) -> StepBuffers:
        """num_tokens: a multiple of 4, so that every tensor is aligned to 16 bytes."""
        numbers = torch.zeros((4, num_tokens), dtype=torch.int32, device=place.device)
        heads = torch.zeros((2, num_tokens, arch.num_heads, arch.head_size), dtype=place.dtype, device=place.device)
        return cls(*numbers.unbind(), *heads.unbind())

    def first(self, num_tokens: int) -> StepBuffers:
        """The buffers of the first tokens."""
        return StepBuffers(*(tensor[:num_tokens] for tensor in self))

    def target(self, layer: CacheLayer) -> CacheTarget:
        """See StepMetadata: all that rope_and_store reads of a step."""
        return CacheTarget(layer.k, layer.v, self.rows, self.columns)

    def fill(self, batch: Batch, target: CacheTarget) -> None:
        """Set the numbers to a step's. The tokens behind it are not stored."""
        count = len(batch.token_ids)
        numbers = (self.token_ids, self.positions, self.rows, self.columns)
        given = [batch.token_ids, batch.positions, target.rows, target.cols]
        torch._foreach_copy_([each[:count] for each in numbers], given)
        self.rows[count:].fill_(-1)


class _Cuts:
    """In place of a backend while a step is captured: ends a graph where attention is called."""

    def __init__(self, backend: AttentionBackend, buffers: StepBuffers, cut: Callable[[], None]) -> None:
        self._backend, self._buffers, self._cut = backend, buffers, cut

    def append_and_attend(
        self, query: Tensor, new: NewTokens, positions: Tensor, layer: CacheLayer, metadata: Metadata
    ) -> Tensor:
        """RoPE and the store belong to the graph. Attention is called between this graph and the next."""
        self._backend.rope_and_store(query, new, positions, layer, metadata)
        self._buffers.query.copy_(query)
        self._cut()
        return self._buffers.attended


class Parts(NamedTuple):
    """What runs a step."""

    model: Decoder
    backend: GpuBackend
    layers: Sequence[CacheLayer]
    last_tokens: Tensor  # see DecodeGraph


class PiecewiseGraph:
    """A step of up to `size` tokens. What is computed for the tokens behind a step's own is neither stored nor read."""

    def __init__(self, size: int, buffers: StepBuffers, parts: Parts) -> None:
        self.size, self._buffers, self._parts = size, buffers.first(size), parts
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def capture(self, pool: Any) -> None:
        """Run the step once, to compile kernels and size buffers, and once into the graphs. Attends to nothing."""
        self._buffers.rows.fill_(-1)
        self._run_layers(lambda: None)
        torch.cuda.synchronize()
        with ExitStack() as capturing:
            self._begin(capturing, pool)
            self._stream = self._run_layers(lambda: self._begin(capturing, pool))

    def run(self, batch: Batch, metadata: StepMetadata) -> Tensor:
        """The residual stream behind the last layer, [size, hidden_size]. Valid until the next replay of any graph."""
        backend, layers = self._parts.backend, self._parts.layers
        self._buffers.fill(batch, metadata.target(layers[0]))
        step = self._buffers.first(len(batch.token_ids))
        for graph, layer in zip(self._graphs, layers, strict=False):
            graph.replay()
            backend.attend(step.query, layer, metadata, step.attended)
        self._graphs[-1].replay()
        return self._stream

    def _begin(self, capturing: ExitStack, pool: Any) -> None:
        """End the graph that is being captured, and begin the next."""
        capturing.close()
        self._graphs.append(torch.cuda.CUDAGraph())
        capturing.enter_context(torch.cuda.graph(self._graphs[-1], pool=pool))

    def _run_layers(self, cut: Callable[[], None]) -> Tensor:
        """All of the step but attention, in whose place `cut` is called."""
        model, backend, layers, last_tokens = self._parts
        batch = Batch((), self._buffers.token_ids, self._buffers.positions, None)
        with _attending(model, _Cuts(backend, self._buffers, cut)):
            return model.run_layers(batch, layers, self._buffers, last_tokens)


class PiecewiseGraphs:
    """One graph for each of a ladder of numbers of tokens; all share buffers and memory."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._captured: list[PiecewiseGraph] = []

    def capture(self, max_tokens: int, pool: Any) -> None:
        """All graphs. max_tokens: of a step. pool: of graphs that are never replayed between a graph's pieces."""
        sizes = _SIZES[: bisect_left(_SIZES, max_tokens) + 1]
        buffers = StepBuffers.create(sizes[-1], self._parts.backend.arch, self._parts.model.place)
        graphs = [PiecewiseGraph(size, buffers, self._parts) for size in sizes]
        for graph in reversed(graphs):
            graph.capture(pool)
        self._captured = graphs

    def for_tokens(self, num_tokens: int) -> PiecewiseGraph | None:
        """The smallest graph that holds so many tokens; None where none so large was captured."""
        return next((graph for graph in self._captured if graph.size >= num_tokens), None)


@contextmanager
def _attending(model: Decoder, backend: AttentionFunction) -> Iterator[None]:
    """Let the model's layers call another backend."""
    before = [layer.attention.backend for layer in model.layers]
    for layer in model.layers:
        layer.attention.backend = backend
    try:
        yield
    finally:
        for layer, own in zip(model.layers, before, strict=True):
            layer.attention.backend = own
