"""Fills a decoder with weights: from safetensors, GGUF, or a random generator."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sarathi.config.schema import ModelConfig
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.fields import UnsupportedModelError
from sarathi.model_executor.loader.checkpoint import NamedTensor, SafetensorsCheckpoint
from sarathi.model_executor.loader.reading import CheckpointError, read_json
from sarathi.model_executor.loader.source import CONFIG_FOLDER, ModelSource, missing_weights, resolve_model
from sarathi.model_executor.models import read_architecture
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.parallel.pipeline import Stage
from sarathi.model_executor.parallel.sharding import Shard, shard_of

_WHOLE: Mapping[str, Shard] = {}  # a model that is not split
_DUMMY_SCALE = 0.02  # keeps activations finite through any number of layers
_STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_UNUSED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class LoadFormatError(ValueError):
    """The model exists, but not in the requested format."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's architecture, and its weights if it has any; `tensors` can be read once."""

    architecture: ModelArchitecture
    tensors: Iterable[NamedTensor] | None


def open_checkpoint(config: ModelConfig) -> Checkpoint:
    """Finds the model and reads its architecture; weights are streamed later. With load_format="dummy" there are none.

    Raises ModelNotFoundError, LoadFormatError, CheckpointError or UnsupportedModelError, all ValueErrors.
    """
    dummy = config.load_format == "dummy"
    source = resolve_model(config.model, weights=not dummy)
    if not dummy:
        _check_format(config, source)
    checkpoint = _open(source)
    return Checkpoint(checkpoint.architecture, None) if dummy else checkpoint


def load_weights(
    model: Decoder, checkpoint: Checkpoint, seed: int, shards: Mapping[str, Shard] = _WHOLE, stage: Stage | None = None
) -> None:
    """Fills `model` in place. seed: for random weights.

    shards: the parts of tensors that the model holds, by the end of their names; other tensors are held whole.
    stage: the layers of the checkpoint that it holds; None: all.
    """
    if checkpoint.tensors is None:
        _fill_randomly(model, seed)
    else:
        _fill(model, checkpoint.tensors, shards, stage or Stage(checkpoint.architecture))


def _open(source: ModelSource) -> Checkpoint:
    if source.format == "gguf":
        from sarathi.model_executor.loader.gguf_checkpoint import GGUFCheckpoint  # needs the package `gguf`

        opened = GGUFCheckpoint(source.path)
        return Checkpoint(opened.architecture(), opened.tensors())
    if source.format == "config":
        return Checkpoint(_read_config(source.path), None)
    stored = SafetensorsCheckpoint(source.path)
    arch = _read_config(source.path / "config.json", stored.dtype)
    if arch.tie_embeddings and stored.has_own_head():
        arch = replace(arch, tie_embeddings=False)
    return Checkpoint(arch, stored.tensors())


def _read_config(path: Path, stored_dtype: Callable[[], str] = lambda: "bfloat16") -> ModelArchitecture:
    """stored_dtype: returns the dtype of the weights; called if the configuration has none."""
    config = read_json(path)
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        config = {**config, "dtype": stored_dtype()}
    try:
        return read_architecture(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from None


def _check_format(config: ModelConfig, source: ModelSource) -> None:
    if source.format == "config":
        raise LoadFormatError(
            f"model={config.model!r} is a configuration without weights: only load_format='dummy' can load it"
            + ("" if source.path.parent == CONFIG_FOLDER else f" ({missing_weights(source.path.parent)})")
        )
    if config.load_format not in ("auto", source.format):
        raise LoadFormatError(
            f"load_format={config.load_format!r}, but model={config.model!r} is {source.format} ({source.path})"
        )


def _fill(model: Decoder, tensors: Iterable[NamedTensor], shards: Mapping[str, Shard], stage: Stage) -> None:
    wanted = {name: tensor for own, tensor in model.parameters() if (name := stage.stored_name(own)) is not None}
    missing = set(wanted)
    last = None
    for last in _used(tensors, stage.arch.tie_embeddings):
        target = wanted.get(last.name)
        if target is None:
            if stage.is_elsewhere(last.name):
                continue
            raise CheckpointError(f"{last.file}: tensor {last.name!r} has no place in this architecture")
        _copy(last, target, shard_of(last.name, shards))
        missing.discard(last.name)
    if missing:
        files = last.file if last is not None else "the checkpoint"
        raise CheckpointError(f"{files}: {len(missing)} tensors are missing: {', '.join(sorted(missing)[:5])}")


def _copy(named: NamedTensor, target: Tensor, shard: Shard | None) -> None:
    """Copies the shard; rows of the target past its end become zero."""
    expected = list(target.shape)
    if shard is not None:
        expected[shard.dim] = shard.size
    if list(named.shape) != expected:
        raise CheckpointError(f"{named.file}: tensor {named.name!r} has shape {list(named.shape)}, expected {expected}")
    if shard is not None and shard.stop - shard.start < target.shape[shard.dim]:
        target.zero_()
        target = target.narrow(shard.dim, 0, shard.stop - shard.start)
    if not target.numel():
        return
    tensor = named.read(shard)
    if tensor.dtype not in _STORED_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORED_DTYPES)
        raise CheckpointError(f"{named.file}: tensor {named.name!r} has type {tensor.dtype}; read are {allowed}")
    target.copy_(tensor)


def _used(tensors: Iterable[NamedTensor], tie_embeddings: bool) -> Iterator[NamedTensor]:
    """Skips tables that exporters add and that are computed here. Of a tied head and embedding, either may be stored,
    or both."""
    for named in tensors:
        if tie_embeddings and named.name == "lm_head.weight":
            yield named._replace(name="model.embed_tokens.weight")
        elif not named.name.endswith(_UNUSED):
            yield named


def _fill_randomly(model: Decoder, seed: int) -> None:
    """Equal seed, device and dtype give equal weights; they are drawn on the device."""
    generator: torch.Generator | None = None
    for name, tensor in model.parameters():
        generator = generator or torch.Generator(tensor.device).manual_seed(seed)
        _draw(name, tensor, generator)


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name.endswith("norm.weight"):
        tensor.fill_(1.0)
    else:
        tensor.uniform_(-_DUMMY_SCALE, _DUMMY_SCALE, generator=generator)
