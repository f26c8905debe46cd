"""Reads GGUF files as if they were Hugging Face checkpoints: keys, names, layouts; knows nothing of the decoder."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor

from sarathi.model_executor.loader.checkpoint import CheckpointError, NamedTensor

_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
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


class _Reader(gguf.GGUFReader):
    """Takes arrays of numbers whole and passes over those of strings: an object for each element of the tokenizer's,
    which are not wanted here, takes seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data, start = self.data.data, orig_offs + 12
        kind, count = gguf.GGUFValueType(_integer(data, orig_offs, 4)), _integer(data, orig_offs + 4, 8)
        types = [gguf.GGUFValueType.ARRAY, kind]
        if kind == gguf.GGUFValueType.STRING:
            return _end_of_strings(data, start, count) - orig_offs, [], [], types
        numbers = self._get(start, self.gguf_scalar_to_np[kind], count)
        return 12 + numbers.nbytes, [numbers], [0], types


class GGUFCheckpoint:
    """One .gguf file, mapped into memory; a tensor is read and dequantised when its turn comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
        except Exception as error:  # the reader raises whatever its parsing of a broken file runs into
            raise CheckpointError(
                f"{path}: corrupt or unreadable GGUF file: {type(error).__name__}: {error}"
            ) from error
        self._model_type = str(self._value("general.architecture"))
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def config(self) -> Mapping[str, Any]:
        """The file's metadata under the keys of a Hugging Face configuration."""
        config = {key: self._value(f"{self._model_type}.{name}") for key, name in _KEYS.items()}
        config = {key: value for key, value in config.items() if value is not None}
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path}: holds no tensor 'token_embd.weight'")
        return {
            **config,
            "model_type": self._model_type,
            "vocab_size": int(embedding.shape[1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_scaling": self._rope_scaling(),
        }

    def tensors(self) -> Iterator[NamedTensor]:
        """Every weight in float32, in the file's order."""
        for name in self._tensors:
            if name != _ROPE_DIVISORS:
                yield NamedTensor(self.path, _hub_name(self.path, name), self._restored(name))

    def _rope_scaling(self) -> dict[str, Any] | None:
        if _ROPE_DIVISORS in self._tensors:
            return {"rope_type": "divided", "divisors": tuple(self._dequantized(_ROPE_DIVISORS).tolist())}
        kind = self._value(f"{self._model_type}.rope.scaling.type")
        if kind in (None, "none"):
            return None
        return {"rope_type": kind, "factor": self._value(f"{self._model_type}.rope.scaling.factor")}

    def _value(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def _restored(self, name: str) -> Tensor:
        tensor = self._dequantized(name)
        heads = {".attn_q.": "attention.head_count", ".attn_k.": "attention.head_count_kv"}
        key = next((heads[part] for part in heads if part in name), None)
        if key is None or self._model_type != _INTERLEAVED:
            return tensor
        return _half_split(tensor, self._value(f"{self._model_type}.{key}"))

    def _dequantized(self, name: str) -> Tensor:
        stored = self._tensors[name]
        try:
            values = gguf.dequantize(_joined(stored.data), stored.tensor_type).reshape(stored.shape[::-1])
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be dequantised: {error}") from error
        return torch.from_numpy(numpy.require(values, requirements="W"))  # a stored float is a read-only view


def _integer(data: memoryview, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _end_of_strings(data: memoryview, at: int, count: int) -> int:
    """Behind `count` strings, each a length and its bytes."""
    for _ in range(count):
        at += 8 + _integer(data, at, 8)
    return at


def _joined(rows: numpy.ndarray) -> numpy.ndarray:
    """Up to _JOINED_ROWS rows in one: `gguf` dequantises 16 at a time, and short ones cost it more than values do."""
    plain = numpy.asarray(rows)
    return plain.reshape(-1, math.gcd(len(plain), _JOINED_ROWS) * plain.shape[-1]) if plain.ndim == 2 else plain


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
