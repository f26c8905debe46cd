"""Reads the weights of GGUF files as if they were a Hugging Face checkpoint: names, layouts, float32 values."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.loader.checkpoint import NamedTensor
from sarathi.model_executor.loader.gguf_config import read_gguf_config
from sarathi.model_executor.loader.gguf_file import GGUFFile, StoredTensor
from sarathi.model_executor.loader.reading import CheckpointError, reading
from sarathi.model_executor.models import read_architecture
from sarathi.model_executor.parallel.sharding import Shard

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_DIVISORS = "rope_freqs.weight"
_JOINED_ROWS = 64
_INTERLEAVED = "llama"  # its converter stores query and key for the interleaved rotary layout
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MOST_ELEMENTS = 2**40


class GGUFCheckpoint:
    """One .gguf file or all parts of one, mapped into memory; a tensor is dequantised when its turn comes."""

    def __init__(self, path: Path) -> None:
        self.path, self._first = path, GGUFFile(path)
        self._tensors: dict[str, tuple[GGUFFile, StoredTensor]] = {}
        with reading(path, "GGUF metadata"):
            parts = _other_parts(path, self._first)
        for file in (self._first, *map(GGUFFile, parts)):
            self._add_tensors(file)
        expected = self._first.get("split.tensors.count", len(self._tensors))
        if expected != len(self._tensors):
            raise CheckpointError(f"{path}: its parts hold {len(self._tensors)} tensors, expected {expected}")

    def architecture(self) -> ModelArchitecture:
        """The architecture by the metadata; the tensors decide about biases and a head of its own."""
        if "token_embd.weight" not in self._tensors:
            raise CheckpointError(f"{self.path}: holds no tensor 'token_embd.weight'")
        vocab_size = self._tensors["token_embd.weight"][1].shape[0]
        divisors = tuple(self._dequantized(_ROPE_DIVISORS).tolist()) if _ROPE_DIVISORS in self._tensors else None
        with reading(self.path, "GGUF metadata"):
            arch = read_architecture(read_gguf_config(self.path, self._first, vocab_size, divisors))
        return replace(
            arch,
            tie_embeddings="output.weight" not in self._tensors,
            qkv_bias=arch.qkv_bias or "blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_up.bias" in self._tensors,
        )

    def tensors(self) -> Iterator[NamedTensor]:
        """Every weight in float32, in the files' order."""
        for name, (file, stored) in self._tensors.items():
            if name != _ROPE_DIVISORS:
                read = partial(self._restored, name)
                yield NamedTensor(file.path, _hub_name(file.path, name), stored.shape, read)

    def _add_tensors(self, file: GGUFFile) -> None:
        for name, stored in file.tensors.items():
            if name in self._tensors:
                raise CheckpointError(f"{file.path}: tensor {name!r} is in two parts")
            with reading(file.path, f"GGUF file: tensor {name!r}"):
                _check_extent(file, stored)
            self._tensors[name] = (file, stored)

    def _restored(self, name: str, shard: Shard | None) -> Tensor:
        """A shard of query or key holds whole heads."""
        tensor = self._dequantized(name, shard)
        heads = {".attn_q.": "attention.head_count", ".attn_k.": "attention.head_count_kv"}
        key = next((heads[part] for part in heads if part in name), None)
        if key is None or self._first["general.architecture"] != _INTERLEAVED:
            return tensor
        num_heads = self._first.get(f"{_INTERLEAVED}.{key}", self._first[f"{_INTERLEAVED}.attention.head_count"])
        num_rows = self._tensors[name][1].shape[0]
        if num_rows % (2 * num_heads):
            raise CheckpointError(f"{self.path}: tensor {name!r} has {num_rows} rows for {num_heads} heads")
        return _half_split(tensor, len(tensor) * num_heads // num_rows)

    def _dequantized(self, name: str, shard: Shard | None = None) -> Tensor:
        file, stored = self._tensors[name]
        kind = gguf.GGMLQuantizationType(stored.kind)
        raw = _raw(file, stored)
        if shard is not None and shard.dim == 0:
            raw = raw[shard.start : shard.stop]
        try:
            values = _columns(raw, kind, stored.shape[-1], shard if shard is not None and shard.dim == 1 else None)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{file.path}: tensor {name!r} cannot be dequantised: {error}") from error
        return torch.from_numpy(numpy.require(values, requirements="W"))  # a stored float is a read-only view


def _other_parts(path: Path, first: Mapping[str, Any]) -> list[Path]:
    """Parts 2, 3 ... of a file that is split."""
    count, number = first.get("split.count", 1), first.get("split.no", 0)
    if count == 1:
        return []
    match = _PART.fullmatch(path.name)
    if match is None or number != 0 or int(match[2]) != 1 or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: part {number + 1} of {count}: load the first, whose name ends in -00001-of-{count:05d}.gguf"
        )
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(2, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of its parts are not there: {', '.join(missing[:3])}")
    return parts


def _check_extent(file: GGUFFile, stored: StoredTensor) -> None:
    if not 0 < math.prod(stored.shape) <= _MOST_ELEMENTS:
        raise ValueError(f"its shape is {list(stored.shape)}")
    end = stored.offset + _num_bytes(stored)
    if end > len(file.data):
        raise ValueError(f"it ends at byte {end}, the file has {len(file.data)}")


def _num_bytes(stored: StoredTensor) -> int:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(stored.kind)]
    if stored.shape[-1] % block_size:
        raise ValueError(f"its rows have {stored.shape[-1]} elements, no multiple of {block_size}")
    return math.prod(stored.shape) // block_size * block_bytes


def _raw(file: GGUFFile, stored: StoredTensor) -> numpy.ndarray:
    """The stored numbers, or bytes of quantised blocks, [rows, ...], as a view of the mapped file."""
    plain = {0: numpy.float32, 1: numpy.float16}.get(stored.kind, numpy.uint8)
    count = _num_bytes(stored) // numpy.dtype(plain).itemsize
    values = numpy.frombuffer(file.data, plain, count, stored.offset)
    return values.reshape(*stored.shape[:-1], -1)


def _joined(rows: numpy.ndarray) -> numpy.ndarray:
    """Up to _JOINED_ROWS rows in one: `gguf` dequantises 16 at a time, and short ones cost it more than values do."""
    return rows.reshape(-1, math.gcd(len(rows), _JOINED_ROWS) * rows.shape[-1]) if rows.ndim == 2 else rows


def _columns(
    raw: numpy.ndarray, kind: gguf.GGMLQuantizationType, num_columns: int, shard: Shard | None
) -> numpy.ndarray:
    """Float32 values of the shard's columns of raw rows; dequantises whole blocks."""
    if shard is None:
        return gguf.dequantize(_joined(raw), kind).reshape(*raw.shape[:-1], num_columns)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    units = raw.shape[-1] // (num_columns // block)  # of a block: bytes, or a number
    first, end = shard.start // block, -(-shard.stop // block)
    covering = numpy.ascontiguousarray(raw[:, first * units : end * units])
    values = gguf.dequantize(_joined(covering), kind).reshape(len(raw), -1)
    return values[:, shard.start - first * block : shard.stop - first * block]


def _half_split(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from pairs (0, 1), (2, 3), ... to halves (0, D/2), (1, D/2 + 1), ..."""
    return rows.view(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _hub_name(path: Path, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    blk, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    if blk != "blk" or part not in _LAYER_NAMES:
        raise CheckpointError(f"{path}: tensor {name!r} is none of a Llama-like decoder's")
    return f"model.layers.{index}.{_LAYER_NAMES[part]}.{kind}"
