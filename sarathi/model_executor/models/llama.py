"""Llama 2, 3 and 3.1, Yi, SmolLM2: the decoder without changes."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, base_architecture
from sarathi.model_executor.fields import Fields
from sarathi.model_executor.models.windows import require_one_kind

CLASSES = ("LlamaForCausalLM",)
MODEL_TYPE = "llama"


def architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """All four attention projections share one bias switch, the feed-forward layer has its own.

    A GGUF file says by its tensors which have one: the keys `qkv_bias` and `o_bias` are its own.
    """
    fields = Fields(config)
    require_one_kind(config, "full_attention")
    bias = fields.flag("attention_bias")
    return base_architecture(
        config, None, mlp_bias=fields.flag("mlp_bias"), o_bias=bias, qkv_bias=fields.flag("qkv_bias", bias)
    )
