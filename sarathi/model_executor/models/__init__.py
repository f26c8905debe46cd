"""Families of models: which configurations are known, and how each differs from the one decoder."""

from collections.abc import Callable, Mapping
from typing import Any

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.fields import Fields, UnsupportedModelError
from sarathi.model_executor.models import llama, mistral, qwen2, qwen3

Reader = Callable[[Mapping[str, Any]], ModelArchitecture]


def families() -> dict[str, Reader]:
    """Readers of a configuration by the class that it names and by its model type."""
    modules = (llama, mistral, qwen2, qwen3)
    return {name: module.architecture for module in modules for name in (*module.CLASSES, module.MODEL_TYPE)}


def read_architecture(config: Mapping[str, Any]) -> ModelArchitecture:
    """The architecture of a Hugging Face configuration; UnsupportedModelError lists the known ones."""
    known, fields = families(), Fields(config)
    classes = fields.texts("architectures") or []
    named = [*classes, *([config["model_type"]] if fields.has_value("model_type") else [])]
    unknown = next((name for name in named if not isinstance(name, str) or name not in known), None)
    if unknown is not None or not named:
        supported = ", ".join(name for name in known if name.endswith("ForCausalLM"))
        raise UnsupportedModelError(f"architecture {unknown!r} is not supported; supported: {supported}")
    if len({known[name] for name in named}) > 1:
        raise UnsupportedModelError(f"architectures and model_type name different families: {', '.join(named)}")
    return known[named[0]](config)
