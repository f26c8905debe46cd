"""Decode steps as CUDA graphs, one for each of a ladder of batch sizes; knows no requests and no memory policy.

A graph is captured over the virtual tensor, whose addresses never move: it survives growth, reclaim and reuse of slots.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarathi.messages import Chunk
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.attention.metadata import DeviceStep, StaticStep
from sarathi.model_executor.models.fused import FusedDecoder
from sarathi.model_executor.ops import Ops

# Above 512 sequences a step is long beside its launches, and a graph of it gains nothing.
_SIZES = (1, 2, 4, 8, *range(16, 257, 8), *range(288, 513, 32))


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph, up to max_num_seqs."""
    return [*(size for size in _SIZES if size < max_num_seqs), *([max_num_seqs] if max_num_seqs <= _SIZES[-1] else [])]


class Limits(NamedTuple):
    """What a step's tensors are made for."""

    max_num_seqs: int
    max_length: int  # tokens of the longest sequence
    blocks: int  # and its blocks; 0 where it lies in a contiguous slot


Compute = Callable[[Tensor, DeviceStep], Tensor]
"""From token ids [B], stand-ins among them, and a step to logits [B, vocab_size], the same memory every time."""


class Replayed(NamedTuple):
    """A step's results, of its sequences without padding; they hold until the next replay of any graph."""

    tokens: Tensor  # [B] int64, the likeliest ones, which are the newest of their homes already
    logits: Tensor  # [B, vocab_size]
    homes: Tensor  # [B] int32


class DecodeGraph:
    """One batch size. Padded rows have length 0: they attend to nothing, are stored nowhere and leave no token."""

    def __init__(self, batch_size: int, limits: Limits, last_tokens: Tensor) -> None:
        """last_tokens: [homes + 1] int64, each resident request's newest token; the last entry takes the padding's."""
        self._batch_size, self._last_tokens = batch_size, last_tokens
        self._static = StaticStep(batch_size, limits.max_length, limits.blocks, last_tokens.device, extras=2)
        self._token_ids, self._homes = self._static.extras
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, compute: Compute, kernels: Ops, pool: Any) -> None:
        """Runs the step once as it is, to compile and size what it needs, and once into the graph."""
        self._run(compute, kernels)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool):
            self._tokens, self._logits = self._run(compute, kernels)

    def replay(
        self, chunks: Sequence[Chunk], address: Address, token_ids: Sequence[int], homes: Sequence[int]
    ) -> Replayed:
        """One step for chunks of one token each; token_ids may be stand-ins; homes: where the results go."""
        size = len(token_ids)
        padding = self._batch_size - size
        extras = [*token_ids, *[0] * padding, *homes, *[self._last_tokens.shape[0] - 1] * padding]
        self._static.fill(chunks, address, extras)
        self._graph.replay()
        return Replayed(self._tokens[:size], self._logits[:size], self._homes[:size])

    def _run(self, compute: Compute, kernels: Ops) -> tuple[Tensor, Tensor]:
        logits = compute(self._token_ids, self._static.step)
        return kernels.argmax_into(logits, self._homes, self._last_tokens), logits


class DecodeGraphs:
    """The ladder, captured largest first so that all share one pool of memory, and one tensor of logits."""

    def __init__(self, sizes: Sequence[int], limits: Limits, last_tokens: Tensor) -> None:
        """last_tokens: see DecodeGraph."""
        self._made = {size: DecodeGraph(size, limits, last_tokens) for size in sorted(sizes)}
        self._last_tokens = last_tokens
        self._captured: dict[int, DecodeGraph] = {}

    def capture(self, model: FusedDecoder, backend: AttentionBackend, layers: Sequence[CacheLayer]) -> None:
        """All graphs."""
        pool = torch.cuda.graph_pool_handle()
        weight = model.decoder.head.weight
        logits = weight.new_empty((max(self._made), weight.shape[0]))

        def compute(token_ids: Tensor, step: DeviceStep) -> Tensor:
            stream = model.embed(token_ids, self._last_tokens)
            model(stream, step.cached, layers, backend.plan_static(step))
            return model.logits(stream, out=logits[: len(token_ids)])

        for graph in reversed(self._made.values()):
            graph.capture(compute, model.kernels, pool)
        self._captured = self._made

    def for_batch(self, batch_size: int) -> DecodeGraph | None:
        """The smallest graph that holds the batch; None where none so large was captured."""
        return next((graph for size, graph in self._captured.items() if size >= batch_size), None)
