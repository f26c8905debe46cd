"""Qwen 2 and 2.5: biases on query, key and value; knows only where their configuration differs."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture

CLASSES = ("Qwen2ForCausalLM",)
MODEL_TYPE = "qwen2"


def window_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The window holds only where it is switched on, and from `max_window_layers` on."""
    if not config.get("use_sliding_window", False):
        return {}
    return {"sliding_window": config["sliding_window"], "first_windowed_layer": config["max_window_layers"]}


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """The bias is not a switch: it is always there."""
    return base_architecture(config, qkv_bias=True, **window_fields(config))
