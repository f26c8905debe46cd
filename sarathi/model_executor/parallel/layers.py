"""Layers that communicate with other ranks, and their installation in a decoder."""

import torch
from torch import Tensor

from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.models.layers import Embedding, Linear
from sarathi.model_executor.ops.types import resolve
from sarathi.model_executor.parallel.ranks import Ranks
from sarathi.model_executor.parallel.sharding import TensorShare


class RowParallelLinear(Linear):
    """A product whose inputs are split over ranks; an all-reduce adds their partial results."""

    def __init__(self, whole: Linear, ranks: Ranks) -> None:
        """whole: has this rank's columns of the weight, and all of the bias."""
        self.parts, self.weight, self.bias, self.ops = whole.parts, whole.weight, whole.bias, whole.ops
        self._ranks = ranks

    def add_to(self, x: Tensor, residual: Tensor) -> None:
        """See Linear.add_to. Rank 0 adds residual and bias to its partial result, so the sum has each once."""
        if self._ranks.rank == 0:
            super().add_to(x, residual)
        else:
            self.ops.linear(x, self.weight, None, residual)
        self._ranks.add_up(residual)


class VocabularyParallelEmbedding(Embedding):
    """Each rank has the vectors of its tokens; an all-reduce adds those of the ranks, zero for other tokens."""

    def __init__(self, part: Embedding, ranks: Ranks) -> None:
        self.weight, self.ops = part.weight, part.ops
        self._ranks, self._first = ranks, ranks.rank * len(part.weight)

    def __call__(self, token_ids: Tensor, last_tokens: Tensor | None = None) -> Tensor:
        """See Embedding."""
        if last_tokens is not None:
            token_ids = resolve(token_ids, last_tokens)
        rows = token_ids - self._first
        is_elsewhere = (rows < 0) | (rows >= len(self.weight))
        vectors = self.ops.embed(rows.masked_fill(is_elsewhere, 0), self.weight)
        vectors.masked_fill_(is_elsewhere.unsqueeze(1), 0)
        self._ranks.add_up(vectors)
        return vectors


class VocabularyParallelHead(Linear):
    """Each rank computes the logits of its tokens; an all-gather gives all ranks all of them."""

    def __init__(self, part: Linear, vocab_size: int, ranks: Ranks) -> None:
        """vocab_size: of the whole model."""
        self.parts, self.weight, self.bias, self.ops = part.parts, part.weight, part.bias, part.ops
        self._vocab_size, self._rows, self._ranks = vocab_size, len(part.weight), ranks

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [S, hidden_size] -> [S, vocab_size]; `out`, contiguous, if given."""
        if not len(x):
            return x.new_empty((0, self._vocab_size))
        pieces = self._ranks.gather(super().__call__(x)).unbind()
        ends = [self._vocab_size - rank * self._rows for rank in range(len(pieces))]
        return torch.cat([piece[:, : max(0, end)] for piece, end in zip(pieces, ends, strict=True)], dim=1, out=out)


def split_over_ranks(model: Decoder, share: TensorShare, ranks: Ranks) -> None:
    """Make a decoder of `share.architecture` one rank of the whole model. Call before its weights are filled."""
    if ranks.size == 1:
        return
    for layer in model.layers:
        layer.attention.output = RowParallelLinear(layer.attention.output, ranks)
        layer.mlp.down = RowParallelLinear(layer.mlp.down, ranks)
    if not model.vocab_size:  # a stage between the first and the last
        return
    model.vocab_size = share.arch.vocab_size
    model.embedding = VocabularyParallelEmbedding(model.embedding, ranks)
    model.head = VocabularyParallelHead(model.head, model.vocab_size, ranks)
