"""The shape of a decoder of the Llama family, read from a Hugging Face configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sarathi.model_executor.fields import Fields, UnsupportedModelError
from sarathi.model_executor.rope import Rope
from sarathi.model_executor.rope_config import extended_length, read_rope

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_MOST_LAYERS, _MOST_HEADS, _MOST_COLUMNS, _MOST_TOKENS = 2**12, 2**12, 2**24, 2**31 - 1


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """Shapes and switches of a decoder.

    A query attends to the last `sliding_window` tokens, itself included (None: to all), except in
    `full_attention_layers`.
    """

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
    full_attention_layers: frozenset[int] = frozenset()
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

    @property
    def num_parameters(self) -> int:
        """Weights, biases and norms of all layers, the embedding, and the head where it is not tied."""
        query, key, value = self.qkv_sizes
        hidden, inner = self.hidden_size, self.intermediate_size
        biases = self.qkv_bias * (query + key + value) + self.o_bias * hidden + self.mlp_bias * (2 * inner + hidden)
        norms = 2 * hidden + self.qk_norm * 2 * self.head_size
        layer = hidden * (query + key + value) + query * hidden + 3 * hidden * inner + biases + norms
        return self.num_layers * layer + hidden + (2 - self.tie_embeddings) * self.vocab_size * hidden

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of `layer` sees, itself included; None for all."""
        return None if layer in self.full_attention_layers else self.sliding_window


def base_architecture(config: Mapping[str, Any], default_kv_heads: int | None, **differences: Any) -> ModelArchitecture:
    """The architecture in a Hugging Face configuration; `differences` are a family's own fields.

    default_kv_heads: number of KV heads if `num_key_value_heads` is absent; None: as many as query heads.
    Raises UnsupportedModelError for a missing key, a value out of range, or one that is not implemented.
    """
    fields = Fields(config)
    _refuse_other_computations(fields)
    name = str((fields.texts("architectures") or [config.get("model_type", "")])[0])
    return ModelArchitecture(name, **{**_common_fields(fields, default_kv_heads, differences), **differences})


def _refuse_other_computations(fields: Fields) -> None:
    """Refuse keys that all families of transformers 5 read and that change the computation."""
    fields.text("hidden_act", ("silu", "swish"), "silu")  # two names of one function
    fields.require("is_causal", (True,))
    fields.require("is_encoder_decoder", (False,))
    fields.require("add_cross_attention", (False,))
    for key in ("quantization_config", "per_layer_config"):
        if fields.inner(key):
            raise fields.refusal(key, "absent: it is not implemented")


def _common_fields(fields: Fields, default_kv_heads: int | None, differences: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = fields.integer("num_attention_heads", 1, _MOST_HEADS)
    hidden_size = fields.integer("hidden_size", 1, _MOST_COLUMNS)
    head_size = differences.get("head_size") or fields.optional_integer("head_dim", 2, _MOST_COLUMNS)
    head_size = head_size or hidden_size // num_heads
    max_positions = fields.integer("max_position_embeddings", 1, _MOST_TOKENS)
    rope = read_rope(fields, head_size, max_positions)
    return {
        "num_layers": fields.integer("num_hidden_layers", 1, _MOST_LAYERS),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size", 1, _MOST_COLUMNS),
        "num_heads": num_heads,
        "num_kv_heads": fields.optional_integer("num_key_value_heads", 1, _MOST_HEADS, default_kv_heads) or num_heads,
        "head_size": head_size,
        "vocab_size": fields.integer("vocab_size", 1, _MOST_COLUMNS),
        "max_positions": extended_length(rope, max_positions),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-30, 1.0),
        "rope": rope,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "dtype": _dtype(fields),
    }


def _dtype(fields: Fields) -> str:
    key = "dtype" if fields.has_value("dtype") else "torch_dtype"
    return fields.text(key, _DTYPES) if fields.has_value(key) else "bfloat16"
