"""GGUF keys as keys of a Hugging Face configuration, with llama.cpp's rules for absent ones."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarathi.model_executor.loader.reading import CheckpointError

_NAMES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_UNUSED = (  # llama.cpp computes these architectures without a window, and reads the vocabulary off the tokens
    "attention.sliding_window", "vocab_size", "tensor_data_layout", "rope.scaling.finetuned",
)  # fmt: skip
_FIXED = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False}
_SAME_AS_HEAD = ("attention.value_length", "rope.dimension_count")
_ROPE_SCALING = (
    "type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow",
)  # fmt: skip
_KNOWN = {
    *_NAMES,
    *_UNUSED,
    *_FIXED,
    *_SAME_AS_HEAD,
    "rope.scale_linear",
    *(f"rope.scaling.{k}" for k in _ROPE_SCALING),
}


def read_gguf_config(
    path: Path, metadata: Mapping[str, Any], vocab_size: int, divisors: tuple[float, ...] | None
) -> dict[str, Any]:
    """The configuration. divisors: the values of the tensor rope_freqs.weight; None where there is none.

    Raises CheckpointError for a key of the architecture that is unknown or not implemented.
    """
    family = metadata.get("general.architecture")
    prefix = f"{family}."
    keys = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    for name, value in keys.items():
        if name not in _KNOWN or (name in _FIXED and value != _FIXED[name]):
            raise CheckpointError(f"{path}: {prefix}{name} is {value!r}: this is not implemented")
    config = {_NAMES[name]: value for name, value in keys.items() if name in _NAMES}
    _check_head_size(path, prefix, keys)
    scaling = _rope_scaling(path, prefix, keys, divisors)
    return {**config, "model_type": family, "vocab_size": vocab_size, "rope_scaling": scaling}


def _check_head_size(path: Path, prefix: str, keys: Mapping[str, Any]) -> None:
    """Raise unless values are as long as keys and RoPE covers whole heads."""
    head_size = keys.get("attention.key_length")
    if head_size is None and keys.get("attention.head_count"):
        head_size = keys.get("embedding_length", 0) // keys["attention.head_count"]
    for name in _SAME_AS_HEAD:
        if head_size is not None and keys.get(name, head_size) != head_size:
            raise CheckpointError(f"{path}: {prefix}{name} is {keys[name]!r}, a head has {head_size}: not implemented")


def _rope_scaling(
    path: Path, prefix: str, keys: Mapping[str, Any], divisors: tuple[float, ...] | None
) -> dict[str, Any]:
    """llama.cpp: a factor without a type is linear, and so is the older key `rope.scale_linear`; 0 means 1."""
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear")) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{path}: {prefix}rope.scaling.type is {kind!r}; known are none, linear, yarn")
    if divisors is not None:
        if kind == "yarn":
            raise CheckpointError(
                f"{path}: {prefix}rope.scaling.type is 'yarn' beside rope_freqs.weight: not implemented"
            )
        scale = factor if kind == "linear" else 1.0
        return {"rope_type": "divided", "divisors": [divisor * scale for divisor in divisors]}
    if kind == "none" or factor == 1.0:
        return {}
    return {"rope_type": "linear", "factor": factor} if kind == "linear" else _yarn(keys, factor)


def _yarn(keys: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """llama.cpp multiplies YaRN's own attention factor by the file's."""
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.get(
            "rope.scaling.original_context_length", keys.get("context_length")
        ),
        "attention_factor": keys.get("rope.scaling.attn_factor", 1.0) * (1.0 + 0.1 * math.log(max(factor, 1.0))),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow"),
    }
