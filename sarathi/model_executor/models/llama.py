"""Llama 2, 3 and 3.1, Yi, SmolLM2: the decoder as it is; knows only where their configuration differs."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture

CLASSES = ("LlamaForCausalLM",)
MODEL_TYPE = "llama"


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """All four attention projections share one bias switch, the feed-forward layer has its own."""
    bias = bool(config.get("attention_bias", False))
    return base_architecture(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
