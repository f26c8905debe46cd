"""Families of models: which configurations are known, and how each differs from the one decoder; knows no weights."""

from collections.abc import Callable, Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture, UnsupportedModelError
from sarathi.model_executor.models import llama, mistral, qwen2, qwen3

Reader = Callable[[Mapping[str, Any]], ModelArchitecture]


def families() -> dict[str, Reader]:
    """Readers of a configuration by the class that it names and by its model type."""
    modules = (llama, mistral, qwen2, qwen3)
    return {name: module.architecture for module in modules for name in (*module.CLASSES, module.MODEL_TYPE)}


def read_architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """The architecture of a Hugging Face configuration; UnsupportedModelError lists the known ones."""
    known = families()
    named = [*(config.get("architectures") or []), config.get("model_type") or ""]
    reader = next((known[name] for name in named if name in known), None)
    if reader is None:
        supported = ", ".join(name for name in known if name.endswith("ForCausalLM"))
        raise UnsupportedModelError(f"architecture {named[0]!r} is not supported; supported: {supported}")
    return reader(config)
