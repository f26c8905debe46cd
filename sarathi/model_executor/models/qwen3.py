"""Qwen 3: each head of query and key is normalised before the rotary embedding; knows only where it differs."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture
from sarathi.model_executor.models.qwen2 import window_fields

CLASSES = ("Qwen3ForCausalLM",)
MODEL_TYPE = "qwen3"


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """The size of a head is a number of its own, not hidden size over heads."""
    bias = bool(config.get("attention_bias", False))
    head_size = config.get("head_dim") or 128
    return base_architecture(
        config, qkv_bias=bias, o_bias=bias, qk_norm=True, head_size=head_size, **window_fields(config)
    )
