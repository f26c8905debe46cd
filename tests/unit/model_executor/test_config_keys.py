"""Keys of configurations, family by family, against transformers' own classes: computed, without effect, or refused."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.fields import UnsupportedModelError
from sarathi.model_executor.models import read_architecture

FAMILIES: dict[str, type[PretrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig, "MistralForCausalLM": MistralConfig, "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}  # fmt: skip
COMPUTED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "dtype", "architectures",
    "eos_token_id",
}  # fmt: skip
ONE_VALUE = {"hidden_act": "gelu", "is_encoder_decoder": True}  # key -> a value that is refused
WITHOUT_EFFECT = {  # on the logits of these decoders in inference, in transformers 5
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "pretraining_tp", "attention_dropout",
    "transformers_version", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type",
}  # fmt: skip
REFUSED: dict[str, Any] = {  # what transformers reads besides the fields of its classes
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "per_layer_config": {"1": {"num_attention_heads": 2}},
    "partial_rotary_factor": 0.5,
    "is_causal": False,
    "add_cross_attention": True,
}
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


def read(family: str, **changes: Any) -> ModelArchitecture:
    values = {"architectures": [family], **SMALL, **changes}
    return read_architecture({key: value for key, value in values.items() if value != "absent"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_classes_is_accounted_for(family: str) -> None:
    """A release of transformers that adds a key fails here: is it computed, without effect, or to be refused?"""
    keys = {field.name for field in fields(FAMILIES[family])}
    assert keys <= COMPUTED | set(ONE_VALUE) | WITHOUT_EFFECT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", [*ONE_VALUE, *REFUSED])
def test_keys_that_change_the_computation_are_refused_by_name(family: str, key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        read(family, **{key: (ONE_VALUE | REFUSED)[key]})


BAD_VALUES = [
    ("num_hidden_layers", 10**5), ("num_hidden_layers", 0), ("num_hidden_layers", "3"), ("num_hidden_layers", 3.0),
    ("num_hidden_layers", True), ("hidden_size", -32), ("vocab_size", 2**40), ("num_attention_heads", None),
    ("num_key_value_heads", 0), ("rms_norm_eps", float("nan")), ("rms_norm_eps", -1e-5), ("rms_norm_eps", 0),
    ("rms_norm_eps", "1e-5"), ("rope_theta", -1.0), ("rope_theta", float("inf")), ("rope_theta", None),
    ("max_position_embeddings", 0), ("head_dim", 1), ("tie_word_embeddings", "yes"), ("torch_dtype", "int8"),
    ("dtype", 7), ("rope_scaling", "yarn"), ("rope_scaling", [1]), ("architectures", "LlamaForCausalLM"),
    ("quantization_config", "awq"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_values_out_of_range_name_the_key(key: str, value: Any) -> None:
    for family in FAMILIES:
        with pytest.raises(UnsupportedModelError, match=key):
            read(family, **{key: value})


@pytest.mark.parametrize("value", [0, -4, 2.5, "16"])
def test_a_window_is_a_positive_number(value: Any) -> None:
    for family in ("MistralForCausalLM", "Qwen2ForCausalLM"):
        with pytest.raises(UnsupportedModelError, match="sliding_window"):
            read(family, sliding_window=value, use_sliding_window=True, max_window_layers=1)


SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("MistralForCausalLM", {}), ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 9}),
    *((family, changes) for family in ("Qwen2ForCausalLM", "Qwen3ForCausalLM") for changes in (
        {}, {"sliding_window": 9}, {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 9}, {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [SLIDING, FULL, SLIDING]},
        {"use_sliding_window": True, "sliding_window": None, "layer_types": [FULL] * 3},
        {"layer_types": [FULL] * 3},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), WINDOWS)
def test_windows_of_layers_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    """Absent keys too: Mistral's window is 4096, Qwen's too, and its first windowed layer 28."""
    theirs = FAMILIES[family](**SMALL | changes)
    kinds = getattr(theirs, "layer_types", None) or [SLIDING] * 3
    arch = read(family, **changes)
    expected = [theirs.sliding_window if kind == SLIDING else None for kind in kinds]
    assert [arch.window_of(layer) for layer in range(3)] == expected


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("Qwen2ForCausalLM", [SLIDING] * 3), ("Qwen3ForCausalLM", [FULL] * 2), ("Qwen2ForCausalLM", FULL),
        ("Qwen2ForCausalLM", [FULL, FULL, "conv"]), ("LlamaForCausalLM", [FULL, SLIDING, FULL]),
        ("MistralForCausalLM", [FULL] * 3),
    ],
)  # fmt: skip
def test_layer_types_that_are_not_computed_are_refused(family: str, kinds: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        read(family, layer_types=kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_transformers_defaults(family: str) -> None:
    changes = {"num_key_value_heads": "absent", "num_attention_heads": 64, "hidden_size": 256}
    theirs = FAMILIES[family](**{key: value for key, value in (SMALL | changes).items() if value != "absent"})
    arch = read(family, **changes)
    head_size = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (arch.num_kv_heads, arch.head_size) == (theirs.num_key_value_heads, head_size)
    assert (arch.rope.theta, arch.tie_embeddings) == (theirs.rope_parameters["rope_theta"], theirs.tie_word_embeddings)


def test_names_of_two_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="different families: MistralForCausalLM, llama"):
        read("MistralForCausalLM", model_type="llama")
    for named in ({"architectures": ["LlamaModel"]}, {"model_type": "gemma"}, {"model_type": ["llama"]}):
        with pytest.raises(UnsupportedModelError, match="supported: LlamaForCausalLM"):
            read("LlamaForCausalLM", **named)


def test_saved_configurations_of_transformers_are_read(tmp_path: Path) -> None:
    for family, made in FAMILIES.items():
        made(**SMALL, architectures=[family], dtype="float16").save_pretrained(tmp_path)
        arch = read_architecture(json.loads((tmp_path / "config.json").read_text()))
        assert (arch.name, arch.dtype) == (family, "float16")
        assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=False).dtype == torch.float16
