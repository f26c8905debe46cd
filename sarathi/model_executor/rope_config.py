"""Reads the rotary embedding of a Hugging Face configuration, with transformers' defaults for absent keys."""

import math
from collections.abc import Callable
from typing import Any

from sarathi.model_executor.fields import Fields, UnsupportedModelError
from sarathi.model_executor.rope import Rope

_LARGEST = 1e9  # of factors, which multiply positions
_MAX_POSITIONS = 2**31 - 1
_KEYS = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor", "divisors",
    "finetuned",  # of the first YaRN checkpoints; changes nothing
})  # fmt: skip


def read_rope(config: Fields, head_size: int, max_positions: int) -> Rope:
    """Reads rope_theta with rope_scaling, and the newer rope_parameters; the older wins, as in transformers.

    Raises UnsupportedModelError for a kind of scaling or a key that is not implemented, and for values out of range.
    """
    values = config.inner("rope_scaling") or config.inner("rope_parameters")
    scaling = Fields(values, "rope_parameters.")
    unknown = sorted(set(values) - _KEYS)
    if unknown:
        raise scaling.refusal(unknown[0], "absent: this key is not implemented")
    for fields in (config, scaling):
        fields.require("partial_rotary_factor", (1, 1.0))
    kind = values.get("rope_type") or values.get("type") or "default"
    if not isinstance(kind, str) or kind not in _READERS:
        supported = ", ".join(name for name in _READERS if name != "divided")
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; supported: {supported}")
    owner = scaling if "rope_theta" in scaling else config
    theta = owner.number("rope_theta", 1.000001, 1e30, 10000.0)
    original = _original(config, scaling, max_positions)
    return Rope(theta, kind, **_READERS[kind](scaling, head_size, max_positions, original))


def extended_length(rope: Rope, max_positions: int) -> int:
    """The longest text in tokens: YaRN and dynamic NTK extend the original length by `factor`."""
    if rope.kind not in ("yarn", "dynamic"):
        return max_positions
    return max(max_positions, min(int(rope.original_max_positions * rope.factor), _MAX_POSITIONS))


def _original(config: Fields, scaling: Fields, max_positions: int) -> int:
    """The length the model was trained on. The top-level key wins over the one in the scaling, as in transformers."""
    key = "original_max_position_embeddings"
    owner = config if key in config else scaling
    return owner.integer(key, 1, _MAX_POSITIONS, max_positions)


def _default(scaling: Fields, head_size: int, max_positions: int, original: int) -> dict[str, Any]:
    return {}


def _linear(scaling: Fields, head_size: int, max_positions: int, original: int) -> dict[str, Any]:
    return {"factor": _factor(scaling)}


def _divided(scaling: Fields, head_size: int, max_positions: int, original: int) -> dict[str, Any]:
    return {"divisors": _divisors(scaling, "divisors", head_size)}


def _dynamic(scaling: Fields, head_size: int, max_positions: int, original: int) -> dict[str, Any]:
    if head_size == 2:
        raise UnsupportedModelError("rope scaling 'dynamic' needs head_dim > 2, got 2")
    return {"factor": scaling.number("factor", 1.0, _LARGEST), "original_max_positions": max_positions}


def _llama3(scaling: Fields, head_size: int, max_positions: int, original: int) -> dict[str, Any]:
    low = scaling.number("low_freq_factor", 1e-9, _LARGEST)
    high = scaling.number("high_freq_factor", 1e-9, _LARGEST)
    if high <= low:
        raise scaling.refusal("high_freq_factor", f"more than low_freq_factor={low}")
    factors = {"factor": _factor(scaling), "low_freq_factor": low, "high_freq_factor": high}
    return {**factors, "original_max_positions": original}


def _yarn(scaling: Fields, head_size: int, max_positions: int, original: int) -> dict[str, Any]:
    factor = max_positions / original if scaling.is_null("factor") else _factor(scaling)
    mscale, of_all = (scaling.optional_number(key, 0.0, _LARGEST) for key in ("mscale", "mscale_all_dim"))
    ratio = _magnitude(factor, mscale) / _magnitude(factor, of_all) if mscale and of_all else _magnitude(factor, 1.0)
    given = scaling.optional_number("attention_factor", 0.0, _LARGEST)
    return {
        "factor": factor,
        "original_max_positions": original,
        "beta_fast": scaling.optional_number("beta_fast", 0.0, _LARGEST) or 32.0,
        "beta_slow": scaling.optional_number("beta_slow", 0.0, _LARGEST) or 1.0,
        "truncate": scaling.flag("truncate", True),
        "attention_factor": ratio if given is None else given,
    }


def _magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (Peng et al., 2023), as DeepSeek generalised it."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(scaling: Fields, head_size: int, max_positions: int, original: int) -> dict[str, Any]:
    factor = scaling.optional_number("factor", 1e-9, _LARGEST) or max_positions / original
    if original < 2:
        raise UnsupportedModelError(f"rope scaling 'longrope' needs an original length of 2 or more, got {original}")
    suggested = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    given = scaling.optional_number("attention_factor", 0.0, _LARGEST)
    return {
        "original_max_positions": original,
        "divisors": _divisors(scaling, "short_factor", head_size),
        "long_divisors": _divisors(scaling, "long_factor", head_size),
        "attention_factor": suggested if given is None else given,
    }


def _factor(scaling: Fields) -> float:
    return scaling.number("factor", 1e-9, _LARGEST)


def _divisors(scaling: Fields, key: str, head_size: int) -> tuple[float, ...]:
    return scaling.numbers(key, head_size // 2, 1e-9, _LARGEST)


_READERS: dict[str, Callable[[Fields, int, int, int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
    "divided": _divided,
}
