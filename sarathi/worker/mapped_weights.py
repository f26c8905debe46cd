"""Weights in mapped memory, which goes back to the system and comes again at the same addresses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sarathi.model_executor.loader.loader import Checkpoint, open_checkpoint
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.placement import Placement
from sarathi.worker.memory import MemoryLimitError, total_bytes
from sarathi.worker.model_builder import ModelBuilder
from sarathi.worker.model_runner import ModelRunner
from vattention import Arena, DeviceError, OutOfMemoryError


@dataclass(frozen=True, slots=True)
class MappedPlacement(Placement):
    """Weights get addresses in an arena."""

    arena: Arena

    def empty(self, *shape: int) -> Tensor:
        """See Placement.empty. The tensor has memory while the arena is mapped."""
        return self.arena.empty(shape, self.dtype)


@dataclass(frozen=True)
class MappedModelBuilder(ModelBuilder):
    """Builds one decoder, which stays with all of its tensors while their memory goes: CUDA graphs contain addresses.

    Its weights are not packed, since a packed weight is a copy in other memory. On a GPU packing changes nothing.
    """

    place: MappedPlacement

    def build(self, checkpoint: Checkpoint) -> Decoder:
        """See ModelBuilder.build."""
        model = self._make()
        self._fill(model, checkpoint)
        return model

    def drop_weights(self, runner: ModelRunner) -> None:
        """See ModelBuilder.drop_weights."""
        self.place.arena.release()

    def reload_weights(self, runner: ModelRunner) -> bool:
        """See ModelBuilder.reload_weights. The decoder is always the same."""
        if not self.place.arena.is_mapped:
            self._fill(runner.model, open_checkpoint(self.config))
        return False

    def _fill(self, model: Decoder, checkpoint: Checkpoint) -> None:
        """Map memory and load the weights; where that fails, nothing stays mapped."""
        self._check_memory()
        try:
            self._map()
            self._load(model, checkpoint)
        except BaseException:
            self._wait()
            self.place.arena.release()
            raise
        self._wait()

    def _map(self) -> None:
        try:
            self.place.arena.map()
        except (OutOfMemoryError, DeviceError) as error:
            raise MemoryLimitError(f"{self.place.device} has no memory for the model's weights: {error}") from error

    def _wait(self) -> None:
        """Until the device has filled the weights."""
        if self.place.device.type == "cuda":
            torch.cuda.synchronize(self.place.device)


def in_mapped_memory(builder: ModelBuilder) -> MappedModelBuilder:
    """The same decoder over an arena, whose addresses are as many as the device has memory."""
    device = builder.place.device
    place = MappedPlacement(builder.place.dtype, device, Arena(total_bytes(device), device))
    return MappedModelBuilder(**vars(builder) | {"place": place})
