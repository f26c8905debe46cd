"""Reads the tensors of a checkpoint one by one, under Hugging Face names; knows formats, not the model behind them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor


class CheckpointError(ValueError):
    """A file that cannot be read or does not hold what the model needs; the message names file and tensor."""


class NamedTensor(NamedTuple):
    """One tensor of a checkpoint and the file that it came from."""

    file: Path
    name: str
    tensor: Tensor


def read_config(path: Path) -> Mapping[str, Any]:
    """A configuration as JSON; CheckpointError where it is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON configuration: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a model's configuration is a JSON object, this is a {type(config).__name__}")
    return config


def read_safetensors(folder: Path) -> Iterator[NamedTensor]:
    """Streams every tensor of every shard; at no time is more than one of them in memory."""
    for file in _shards(folder):
        yield from _read_shard(file)


def _read_shard(file: Path) -> Iterator[NamedTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a handle, not a dict)
                yield NamedTensor(file, name, opened.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: corrupt or unreadable safetensors file: {error}") from error


def _shards(folder: Path) -> list[Path]:
    """The files that the index names; without an index, all there are."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(read_config(index).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(missing)} files that are not in the folder: {', '.join(missing[:3])}"
        )
    return [folder / name for name in names]
