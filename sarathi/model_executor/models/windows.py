"""The layers of a Qwen model that have sliding window attention."""

from collections.abc import Mapping
from typing import Any

from sarathi.model_executor.fields import Fields

_KINDS = ("full_attention", "sliding_attention")


def window_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """By `layer_types` if present; else the layers from `max_window_layers` on, if `use_sliding_window`.

    Keys that are absent have transformers' defaults: max_window_layers 28, sliding_window 4096.
    """
    fields = Fields(config)
    num_layers = fields.integer("num_hidden_layers", 1, 2**12)
    first = fields.integer("max_window_layers", 0, 2**31 - 1, 28)
    window = (
        fields.optional_integer("sliding_window", 1, 2**31 - 1, 4096) if fields.flag("use_sliding_window") else None
    )
    kinds = fields.texts("layer_types")
    if kinds is None:
        return _of_layers(window, frozenset(range(min(first, num_layers))), num_layers)
    if len(kinds) != num_layers or not set(kinds) <= set(_KINDS):
        raise fields.refusal("layer_types", f"{num_layers} times one of {', '.join(map(repr, _KINDS))}")
    full = frozenset(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) < num_layers and window is None:
        raise fields.refusal(
            "layer_types", "'full_attention' alone, for use_sliding_window or sliding_window is not set"
        )
    return _of_layers(window, full, num_layers)


def _of_layers(window: int | None, full: frozenset[int], num_layers: int) -> dict[str, Any]:
    if window is None or len(full) == num_layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def require_one_kind(config: Mapping[str, Any], kind: str) -> None:
    """Raise for `layer_types` other than `kind`, in families whose layers are all of one kind."""
    fields = Fields(config)
    if set(fields.texts("layer_types") or ()) - {kind}:
        raise fields.refusal("layer_types", f"{kind!r} in every layer")
