"""From a checkpoint to one rank's decoder, as often as its weights are loaded."""

import ctypes
from contextlib import suppress
from dataclasses import dataclass

from sarathi.config.schema import ModelConfig
from sarathi.model_executor.attention.base import AttentionBackend
from sarathi.model_executor.loader.loader import Checkpoint, load_weights, open_checkpoint
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops import create_ops
from sarathi.model_executor.parallel.layers import split_over_ranks
from sarathi.model_executor.parallel.pipeline import Stage, connect_stages
from sarathi.model_executor.parallel.ranks import Ranks
from sarathi.model_executor.parallel.sharding import TensorShare
from sarathi.model_executor.placement import Placement
from sarathi.worker.memory import check_weights
from sarathi.worker.model_runner import ModelRunner


@dataclass(frozen=True)
class ModelBuilder:
    """What a rank's decoder is made of, besides the weights. To drop the weights is to drop the decoder."""

    config: ModelConfig
    share: TensorShare
    stage: Stage
    place: Placement
    attention: AttentionBackend
    ranks: Ranks
    max_model_len: int

    def build(self, checkpoint: Checkpoint) -> Decoder:
        """The decoder with the weights of `checkpoint`. MemoryLimitError where they need more memory than is free."""
        self._check_memory()
        model = self._make()
        self._load(model, checkpoint)
        model.pack()
        return model

    def drop_weights(self, runner: ModelRunner) -> None:
        """Give the memory of the weights back to the system. No step runs."""
        if hasattr(runner, "model"):
            del runner.model
            _return_free_memory()

    def reload_weights(self, runner: ModelRunner) -> bool:
        """Read the weights again where they were dropped; whether `runner` has another decoder. Raises as `build`."""
        if hasattr(runner, "model"):
            return False
        runner.model = self.build(open_checkpoint(self.config))
        return True

    def _check_memory(self) -> None:
        check_weights(self.stage.architecture.num_parameters, self.place.dtype, self.place.device)

    def _make(self) -> Decoder:
        """The decoder before its weights are filled."""
        place, ranks = self.place, self.ranks
        model = Decoder(self.stage.architecture, place, create_ops(place.device), self.attention, self.max_model_len)
        split_over_ranks(model, self.share, ranks)
        connect_stages(model, self.stage, ranks)
        return model

    def _load(self, model: Decoder, checkpoint: Checkpoint) -> None:
        shards = self.share.shards() if self.ranks.size > 1 else {}
        load_weights(model, checkpoint, self.config.seed + self.ranks.number, shards, self.stage)


def _return_free_memory() -> None:
    """Give memory back to the system that the C library keeps for later: on the CPU, that of freed tensors."""
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
