"""Qwen 2 and 2.5: biases on query, key and value."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture
from sarathi.model_executor.models.windows import window_fields

CLASSES = ("Qwen2ForCausalLM",)
MODEL_TYPE = "qwen2"


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """The configuration has no key for the bias, which is always present."""
    return base_architecture(config, 32, qkv_bias=True, **window_fields(config))
