"""From a checkpoint to one rank's decoder, as often as its weights are loaded."""

import ctypes
from contextlib import suppress
from dataclasses import dataclass

from sarathi.config.schema import ModelConfig
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.loader.loader import Checkpoint, load_weights
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops import create_ops
from sarathi.model_executor.parallel.layers import split_over_ranks
from sarathi.model_executor.parallel.pipeline import Stage, connect_stages
from sarathi.model_executor.parallel.ranks import Ranks
from sarathi.model_executor.parallel.sharding import TensorShare
from sarathi.model_executor.placement import Placement
from sarathi.worker.memory import check_weights


@dataclass(frozen=True)
class ModelBuilder:
    """What a rank's decoder is made of, besides the weights."""

    config: ModelConfig
    share: TensorShare
    stage: Stage
    place: Placement
    attention: AttentionBackend
    ranks: Ranks
    max_model_len: int

    def build(self, checkpoint: Checkpoint) -> Decoder:
        """The decoder with the weights of `checkpoint`. MemoryLimitError where they need more memory than is free."""
        arch, place, ranks = self.stage.architecture, self.place, self.ranks
        check_weights(arch.num_parameters, place.dtype, place.device)
        model = Decoder(arch, place, create_ops(place.device), self.attention, self.max_model_len)
        split_over_ranks(model, self.share, ranks)
        connect_stages(model, self.stage, ranks)
        shards = self.share.shards() if ranks.size > 1 else {}
        load_weights(model, checkpoint, self.config.seed + ranks.number, shards, self.stage)
        return model


def return_free_memory() -> None:
    """Give memory back to the system that the C library keeps for later: on the CPU, that of freed tensors."""
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
