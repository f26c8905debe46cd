"""Decode steps as CUDA graphs, one for each of a ladder of batch sizes.

A graph is captured over the virtual tensor, whose addresses never move: it survives growth, reclaim and reuse of slots.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarathi.messages import Chunk, PrefixGroup
from sarathi.model_executor.attention.address import Address, CacheLayer
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.attention.metadata import DeviceStep, StaticStep
from sarathi.model_executor.batch import Batch
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops import Ops
from sarathi.model_executor.ops.types import CascadeShape

# A step of more than 512 sequences takes much longer than its launches: a graph of it gains nothing.
_SIZES = (1, 2, 4, 8, *range(16, 257, 8), *range(288, 513, 32))


_CASCADE_SIZES = (4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def ladder(max_num_seqs: int, sizes: Sequence[int] = _SIZES) -> list[int]:
    """Batch sizes that get a graph, up to max_num_seqs."""
    return [*(size for size in sizes if size < max_num_seqs), *([max_num_seqs] if max_num_seqs <= sizes[-1] else [])]


class Limits(NamedTuple):
    """The sizes that a step's tensors are allocated for."""

    max_num_seqs: int
    max_length: int  # tokens of the longest sequence
    blocks: int  # of the longest sequence; 0 for contiguous slots
    can_capture: bool = True  # whether the attention backend captures graphs over the layers of every rank
    cascade: CascadeShape | None = None  # of steps whose sequences share tokens; None: no graph is captured for them


Compute = Callable[[Tensor, DeviceStep], Tensor]
"""From token ids [B], placeholder tokens among them, and a step to logits [B, vocab_size], always at one address."""


class Replayed(NamedTuple):
    """Results of a step's B sequences, without padding. Valid until the next replay of any graph."""

    tokens: Tensor  # [B] int64, the argmax; already the last tokens of their slots
    logits: Tensor  # [B, vocab_size]
    slots: Tensor  # [B] int32


class DecodeGraph:
    """One batch size. Padding has length 0: it attends to nothing, is not stored, and changes no last token."""

    def __init__(
        self, batch_size: int, limits: Limits, last_tokens: Tensor, cascade: CascadeShape | None = None
    ) -> None:
        """last_tokens: [slots + 1] int64, the last token of each slot's request; the last entry is for padding."""
        self._batch_size, self._last_tokens = batch_size, last_tokens
        self._static = StaticStep(
            batch_size, limits.max_length, limits.blocks, last_tokens.device, extras=2, cascade=cascade
        )
        self._token_ids, self._slots = self._static.extras
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, compute: Compute, ops: Ops, pool: Any) -> None:
        """Run the step once eagerly, to compile kernels and size buffers, and once into the graph."""
        self._run(compute, ops)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool):
            self._tokens, self._logits = self._run(compute, ops)

    def replay(
        self, chunks: Sequence[Chunk], address: Address, token_ids: Sequence[int], slots: Sequence[int],
        groups: Sequence[PrefixGroup] = (),
    ) -> Replayed:  # fmt: skip
        """One step of chunks of one token each; token_ids may be placeholders; slots: where the tokens are written."""
        size = len(token_ids)
        padding = self._batch_size - size
        extras = [*token_ids, *[0] * padding, *slots, *[self._last_tokens.shape[0] - 1] * padding]
        self._static.fill(chunks, address, extras, groups)
        self._graph.replay()
        return Replayed(self._tokens[:size], self._logits[:size], self._slots[:size])

    def _run(self, compute: Compute, ops: Ops) -> tuple[Tensor, Tensor]:
        logits = compute(self._token_ids, self._static.step)
        if not len(logits):  # of a stage before the last
            return self._slots.new_empty(0, dtype=torch.int64), logits
        return ops.argmax_into(logits, self._slots, self._last_tokens), logits


class DecodeGraphs:
    """The ladder, captured largest first so that all share one memory pool, and one tensor of logits.

    Steps whose sequences share tokens have a ladder of their own: other steps pay nothing for it.
    """

    def __init__(self, sizes: Sequence[int], limits: Limits, last_tokens: Tensor) -> None:
        """last_tokens: see DecodeGraph."""
        kinds: list[tuple[int, CascadeShape | None]] = [(size, None) for size in sizes]
        if sizes and limits.cascade is not None:
            kinds += [(size, limits.cascade) for size in ladder(limits.max_num_seqs, _CASCADE_SIZES)]
        kinds.sort(key=itemgetter(0))
        self._made = {(size, shape is not None): DecodeGraph(size, limits, last_tokens, shape) for size, shape in kinds}
        self._last_tokens = last_tokens
        self._captured: dict[tuple[int, bool], DecodeGraph] = {}

    def capture(self, model: Decoder, backend: AttentionBackend, layers: Sequence[CacheLayer], pool: Any) -> None:
        """All graphs."""
        logits = model.head.weight.new_empty((max(self._made)[0], model.vocab_size))

        def compute(token_ids: Tensor, step: DeviceStep) -> Tensor:
            batch = Batch((), token_ids, step.cached, None)
            return model(batch, layers, backend.plan_static(step), self._last_tokens, logits[: len(token_ids)])

        for graph in reversed(self._made.values()):
            graph.capture(compute, model.ops, pool)
        self._captured = self._made

    def for_batch(self, batch_size: int, *, cascades: bool = False) -> DecodeGraph | None:
        """The smallest graph that holds the batch; None where none so large was captured.

        cascades: whether its sequences share tokens that are to be read once.
        """
        kinds = self._captured.items()
        return next((graph for (size, kind), graph in kinds if size >= batch_size and kind == cascades), None)
