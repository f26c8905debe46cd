"""Reads the tensors of a safetensors checkpoint one by one, under their Hugging Face names."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from sarathi.model_executor.loader.reading import CheckpointError, read_json, reading
from sarathi.model_executor.loader.source import INDEX_FILE, WEIGHTS_FILE
from sarathi.model_executor.parallel.sharding import Shard
from sarathi.wording import short_repr

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class NamedTensor(NamedTuple):
    """One tensor of a checkpoint: its file, whole shape, and a function that reads all or a shard of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    read: Callable[[Shard | None], Tensor]

    @property
    def tensor(self) -> Tensor:
        """All of it."""
        return self.read(None)


class SafetensorsCheckpoint:
    """The files that make up a folder's checkpoint: model.safetensors, else those that the index names.

    Other .safetensors files beside them (adapters, another format's copy) are not read. Weights are streamed: at no
    time is more than one tensor in memory. Raises CheckpointError for files that are missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in _weight_files(folder):
            for name in _names(file):
                if name in self._files:
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {self._files[name].name}")
                self._files[name] = file

    def tensors(self) -> Iterator[NamedTensor]:
        """Every tensor, file by file."""
        for file in dict.fromkeys(self._files.values()):
            yield from _read_file(file)

    def has_own_head(self) -> bool:
        """Whether it holds an output head that differs from its embedding, whatever config.json says."""
        if _HEAD not in self._files or _EMBEDDING not in self._files:
            return False
        return not torch.equal(self._read(_HEAD), self._read(_EMBEDDING))

    def dtype(self) -> str:
        """The dtype of the stored embedding, or else of the head; bfloat16 if there is neither."""
        name = _EMBEDDING if _EMBEDDING in self._files else _HEAD
        return str(self._read(name).dtype).removeprefix("torch.") if name in self._files else "bfloat16"

    def _read(self, name: str) -> Tensor:
        file = self._files[name]
        with reading(file, "safetensors file"), safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def _read_file(file: Path) -> Iterator[NamedTensor]:
    with reading(file, "safetensors file"), safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (a handle, not a dict)
            stored = opened.get_slice(name)
            yield NamedTensor(file, name, tuple(stored.get_shape()), partial(_read_part, file, opened, name))


def _read_part(file: Path, opened: Any, name: str, shard: Shard | None) -> Tensor:
    """Reads no more than the shard from the file."""
    with reading(file, "safetensors file"):
        if shard is None:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
        part = slice(shard.start, shard.stop)
        tensor = opened.get_slice(name)[(slice(None),) * shard.dim + (part,)]
        return tensor


def _names(file: Path) -> list[str]:
    with reading(file, "safetensors file"), safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    with reading(index, "index of weight files"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        foreign = [name for name in names if Path(name).name != name]
        if foreign or not names:
            raise ValueError(f"weight_map must name files of its folder, not {short_repr(foreign)}")
        missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(missing)} files that are not in the folder: {', '.join(missing[:3])}"
        )
    return [folder / name for name in names]
