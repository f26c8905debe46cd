"""What a decoder of the Llama family looks like, as numbers; knows no tensors, no files and no family's name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROPE_TYPES = ("default", "linear", "llama3", "divided")


class UnsupportedModelError(ValueError):
    """The configuration asks for something that the decoder does not compute; the message says what it does."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: frequencies theta^(-2i/D), then scaled.

    kind: "default"; "linear" divides all by `factor`; "llama3" divides those turning less than `low_freq_factor`
        times in `original_max_positions`, and blends up to `high_freq_factor`; "divided" by `divisors`, [D/2].
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """Shapes and switches of a decoder; layers from `first_windowed_layer` on see the last `sliding_window` tokens."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: Rope
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    first_windowed_layer: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={self.num_heads} must be a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise UnsupportedModelError(f"head_dim={self.head_size} must be even for the rotary embedding")

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Columns of the query, key and value parts of the fused projection."""
        kv_size = self.num_kv_heads * self.head_size
        return self.num_heads * self.head_size, kv_size, kv_size

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of `layer` sees, itself included; None for all."""
        return self.sliding_window if layer >= self.first_windowed_layer else None


def base_architecture(config: Mapping[str, Any], **differences: Any) -> ModelArchitecture:
    """The architecture in a Hugging Face configuration; `differences` are a family's own fields.

    Raises UnsupportedModelError for a missing key, another activation or another rope scaling.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act={config['hidden_act']!r} is not supported; supported: 'silu'")
    try:
        return ModelArchitecture(**{**_common_fields(config), **differences})
    except KeyError as missing:
        raise UnsupportedModelError(f"the model's configuration has no {missing}") from missing


def _common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = config["num_attention_heads"]
    return {
        "name": (config.get("architectures") or [config.get("model_type", "")])[0],
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_size": config.get("head_dim") or config["hidden_size"] // num_heads,
        "vocab_size": config["vocab_size"],
        "max_positions": config["max_position_embeddings"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope": _rope(config),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
    }


def _rope(config: Mapping[str, Any]) -> Rope:
    """Reads both spellings: rope_theta with rope_scaling, and the newer rope_parameters."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_TYPES[:3])}")
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    renamed = {"original_max_position_embeddings": "original_max_positions"}
    known = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "divisors")
    return Rope(float(theta), kind, **{renamed.get(key, key): scaling[key] for key in known if key in scaling})
