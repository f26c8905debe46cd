"""Qwen 3: each head of query and key is normalised before the rotary embedding."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture
from sarathi.model_executor.fields import Fields
from sarathi.model_executor.models.windows import window_fields

CLASSES = ("Qwen3ForCausalLM",)
MODEL_TYPE = "qwen3"


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """The head size is a key of its own, not hidden size / heads."""
    fields = Fields(config)
    bias, head_size = fields.flag("attention_bias"), fields.integer("head_dim", 2, 2**24, 128)
    return base_architecture(
        config, 32, qkv_bias=bias, o_bias=bias, qk_norm=True, head_size=head_size, **window_fields(config)
    )
