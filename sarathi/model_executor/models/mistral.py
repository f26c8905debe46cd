"""Mistral: every layer sees a window of the last tokens; knows only where its configuration differs."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture

CLASSES = ("MistralForCausalLM",)
MODEL_TYPE = "mistral"


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """`sliding_window` is null in the releases after the first, which see everything."""
    return base_architecture(config, sliding_window=config.get("sliding_window"))
