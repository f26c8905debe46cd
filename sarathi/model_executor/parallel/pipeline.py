"""Pipeline parallelism: the layers of each stage, and the residual stream between stages."""

import re
from dataclasses import dataclass, replace

from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.models.layers import Embedding
from sarathi.model_executor.parallel.ranks import Ranks
from sarathi.model_executor.parallel.sharding import ShardingError

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stage:
    """Stage `index` of `count`: consecutive layers; the first stage has the embedding, the last norm and head.

    arch: of the whole model, or of one rank's share of it. Raises ShardingError for more stages than layers.
    """

    arch: ModelArchitecture
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count > self.arch.num_layers:
            raise ShardingError(
                f"pipeline_parallel_size={self.count}: the model has {self.arch.num_layers} layers, and a stage has at "
                "least one"
            )

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def layers(self) -> range:
        """Indices in the whole model; stages differ by at most one layer."""
        first, stop = (self.arch.num_layers * index // self.count for index in (self.index, self.index + 1))
        return range(first, stop)

    @property
    def architecture(self) -> ModelArchitecture:
        """The shapes of a decoder with this stage's layers.

        It has at most one of embedding and head; the last stage has its own copy of a tied head.
        """
        if self.count == 1:
            return self.arch
        layers, full = self.layers, self.arch.full_attention_layers
        return replace(
            self.arch,
            num_layers=len(layers),
            full_attention_layers=frozenset(layers.index(each) for each in full if each in layers),
            vocab_size=self.arch.vocab_size if self.is_first or self.is_last else 0,
            tie_embeddings=True,
        )

    def stored_name(self, name: str) -> str | None:
        """The name in the checkpoint of a tensor of this stage's decoder; None: the stage does not use it."""
        if name == _EMBEDDING and not self.is_first:
            return None if not self.is_last else _EMBEDDING if self.arch.tie_embeddings else _HEAD
        if name == _NORM and not self.is_last:
            return None
        return _LAYER.sub(lambda match: f"model.layers.{int(match[1]) + self.layers.start}.", name)

    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to other stages only."""
        if (match := _LAYER.match(name)) is not None:
            return int(match[1]) < self.arch.num_layers and int(match[1]) not in self.layers
        holders = {_EMBEDDING: self.is_first, _NORM: self.is_last, _HEAD: self.is_last}
        return not holders.get(name, True)


class ReceivedStream(Embedding):
    """Replaces the embedding: receives the residual stream of the previous stage."""

    def __init__(self, embedding: Embedding, hidden_size: int, ranks: Ranks) -> None:
        self.weight, self.ops, self._hidden_size, self._ranks = embedding.weight, embedding.ops, hidden_size, ranks

    def __call__(self, token_ids: Tensor, last_tokens: Tensor | None = None) -> Tensor:
        """token_ids: [T], only their number is used -> [T, hidden_size]."""
        stream = self.weight.new_empty(len(token_ids), self._hidden_size)
        self._ranks.receive(stream)
        return stream


def connect_stages(model: Decoder, stage: Stage, ranks: Ranks) -> None:
    """Make a decoder of `stage.architecture` receive and send the stream. Call before its weights are filled."""
    if not stage.is_first:
        model.embedding = ReceivedStream(model.embedding, stage.arch.hidden_size, ranks)
    if not stage.is_last:
        model.vocab_size, model.pass_on = 0, ranks.send
