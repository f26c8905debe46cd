"""Mistral: every layer has sliding window attention."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture
from sarathi.model_executor.fields import Fields
from sarathi.model_executor.models.windows import require_one_kind

CLASSES = ("MistralForCausalLM",)
MODEL_TYPE = "mistral"


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """`sliding_window` is null in releases after the first, which have full attention; absent, it is 4096."""
    window = Fields(config).optional_integer("sliding_window", 1, 2**31 - 1, 4096)
    require_one_kind(config, "full_attention" if window is None else "sliding_attention")
    return base_architecture(config, 8, sliding_window=window)
