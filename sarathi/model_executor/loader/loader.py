"""Fills a decoder with weights: from safetensors, GGUF, or a random generator; knows no cache and no requests."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sarathi.config.schema import ModelConfig
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.loader.checkpoint import CheckpointError, NamedTensor, read_config, read_safetensors
from sarathi.model_executor.loader.gguf_checkpoint import GGUFCheckpoint
from sarathi.model_executor.loader.source import ModelSource, resolve_model
from sarathi.model_executor.models import read_architecture
from sarathi.model_executor.models.decoder import Decoder

_DUMMY_SCALE = 0.02  # keeps activations finite through any number of layers
_UNUSED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class LoadFormatError(ValueError):
    """The model is there, but not in the format that was asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's shape, and its weights where it has any; `tensors` can be read once."""

    architecture: ModelArchitecture
    tensors: Iterable[NamedTensor] | None


def open_checkpoint(config: ModelConfig) -> Checkpoint:
    """Finds the model and reads its shape; weights are streamed later. `tensors` is None for load_format="dummy".

    Raises ModelNotFoundError, LoadFormatError, CheckpointError or UnsupportedModelError, all ValueErrors.
    """
    dummy = config.load_format == "dummy"
    source = resolve_model(config.model, weights=not dummy)
    if not dummy:
        _check_format(config, source)
    checkpoint = _open(source)
    return Checkpoint(checkpoint.architecture, None) if dummy else checkpoint


def load_weights(model: Decoder, checkpoint: Checkpoint, seed: int) -> None:
    """Fills `model` in place and packs it for its device; `seed` is for weights that are drawn."""
    if checkpoint.tensors is None:
        _fill_randomly(model, seed)
    else:
        _fill(model, checkpoint.tensors)
    model.pack()


def _open(source: ModelSource) -> Checkpoint:
    if source.format == "gguf":
        opened = GGUFCheckpoint(source.path)
        return Checkpoint(read_architecture(opened.config()), opened.tensors())
    if source.format == "safetensors":
        config = read_config(source.path / "config.json")
        return Checkpoint(read_architecture(config), read_safetensors(source.path))
    return Checkpoint(read_architecture(read_config(source.path)), None)


def _check_format(config: ModelConfig, source: ModelSource) -> None:
    if source.format == "config":
        raise LoadFormatError(
            f"model={config.model!r} is a configuration without weights: only load_format='dummy' can load it"
        )
    if config.load_format not in ("auto", source.format):
        raise LoadFormatError(
            f"load_format={config.load_format!r}, but model={config.model!r} is {source.format} ({source.path})"
        )


def _fill(model: Decoder, tensors: Iterable[NamedTensor]) -> None:
    wanted = dict(model.parameters())
    missing = set(wanted)
    last = None
    for last in _used(tensors, model):
        target = wanted.get(last.name)
        if target is None:
            raise CheckpointError(f"{last.file}: tensor {last.name!r} has no place in this architecture")
        if target.shape != last.tensor.shape:
            raise CheckpointError(
                f"{last.file}: tensor {last.name!r} has shape {list(last.tensor.shape)}, expected {list(target.shape)}"
            )
        target.copy_(last.tensor)
        missing.discard(last.name)
    if missing:
        files = last.file if last is not None else "the checkpoint"
        raise CheckpointError(f"{files}: {len(missing)} tensors are missing: {', '.join(sorted(missing)[:5])}")


def _used(tensors: Iterable[NamedTensor], model: Decoder) -> Iterator[NamedTensor]:
    """Leaves out what some exporters add: tables that are computed here, and a head that is the embedding."""
    for named in tensors:
        repeated_head = named.name == "lm_head.weight" and model.tie_embeddings
        if not named.name.endswith(_UNUSED) and not repeated_head:
            yield named


def _fill_randomly(model: Decoder, seed: int) -> None:
    """The same weights for the same seed, device and dtype; drawn on the device itself."""
    generator: torch.Generator | None = None
    for name, tensor in model.parameters():
        generator = generator or torch.Generator(tensor.device).manual_seed(seed)
        _draw(name, tensor, generator)


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name.endswith("norm.weight"):
        tensor.fill_(1.0)
    else:
        tensor.uniform_(-_DUMMY_SCALE, _DUMMY_SCALE, generator=generator)
