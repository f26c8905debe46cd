"""A language-model serving engine whose KV cache is contiguous in virtual memory and mapped to pages on demand.

What `__all__` names is found on first use: importing the package alone imports neither torch nor a model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sarathi.engine.outputs import RequestOutput
    from sarathi.entrypoints.llm import LLM
    from sarathi.sampling_params import SamplingParams
    from sarathi.structured_outputs import StructuredOutputsParams

__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "sarathi.entrypoints.llm",
    "RequestOutput": "sarathi.engine.outputs",
    "SamplingParams": "sarathi.sampling_params",
    "StructuredOutputsParams": "sarathi.structured_outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
