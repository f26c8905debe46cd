"""Tiny models and vocabularies written as GGUF files, as llama.cpp's converter does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import TinyModel
from tokenizers import pre_tokenizers
from transformers import PretrainedConfig

Calls = Sequence[tuple[Any, ...]]
"""Names of the writer's methods, each with its arguments."""

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 letters of byte-level tokens
CONTROL_TYPE = 3
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
YARN: Calls = [
    ("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0),
    ("add_rope_scaling_orig_ctx_len", 64),
]  # fmt: skip
MODELS: dict[str, tuple[str, Calls]] = {  # a tiny model -> its architecture in GGUF, and what its rope scaling is there
    "llama2": ("llama", []), "llama-with-biases": ("llama", []), "smollm2": ("llama", []), "qwen2": ("qwen2", []),
    "qwen3": ("qwen3", []), "llama-yarn": ("llama", YARN),
    "llama-linear": ("llama", [("add_rope_scaling_factor", 2.5)]),  # llama.cpp: a factor without a type is linear
}  # fmt: skip


def write_gguf(tiny: TinyModel, name: str, file: Path, *extra: tuple[Any, ...]) -> None:
    """extra: further calls of the writer, as (name of its method, arguments)."""
    config, (family, scaling) = tiny.reference.config, MODELS[name]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(file, family)
    for method, *values in [
        ("add_block_count", config.num_hidden_layers), ("add_embedding_length", config.hidden_size),
        ("add_feed_forward_length", config.intermediate_size), ("add_head_count", config.num_attention_heads),
        ("add_head_count_kv", config.num_key_value_heads), ("add_context_length", config.max_position_embeddings),
        ("add_layer_norm_rms_eps", config.rms_norm_eps), ("add_key_length", head_size),
        ("add_value_length", head_size), ("add_rope_freq_base", config.rope_parameters["rope_theta"]),
        ("add_vocab_size", config.vocab_size), *scaling, *extra,
    ]:  # fmt: skip
        getattr(writer, method)(*values)
    weights = tiny.reference.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    for full_name, weight in weights.items():
        writer.add_tensor(*as_stored(full_name, weight.numpy(), config, family))
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_stored(full_name: str, weight: np.ndarray, config: PretrainedConfig, family: str) -> tuple[str, np.ndarray]:
    """llama.cpp's converter: query and key rows of arch llama are interleaved, weights and biases alike."""
    stem, kind = full_name.rsplit(".", 1)
    layer, rest = stem.split(".", 3)[2:] if stem.startswith("model.layers.") else (None, stem)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(rest)
    if heads and family == "llama":
        halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
        weight = halves.swapaxes(1, 2).reshape(weight.shape)
    prefix = "" if layer is None else f"blk.{layer}."
    return f"{prefix}{NAMES[rest]}.{kind}", np.ascontiguousarray(weight)


def write_vocabulary(
    file: Path, pre: str | None, tokens: list[str], merges: list[str], control: set[str], *extra: tuple[Any, ...]
) -> Path:  # fmt: skip
    """A model of one layer of width 32 around a vocabulary: llama.cpp reads whole models. BOS is `<s>`, if it is there.

    extra: further calls of the writer, as (name of its method, arguments).
    """
    writer = gguf.GGUFWriter(file, "llama")
    for method, *values in [
        ("add_context_length", 128), ("add_embedding_length", 32), ("add_block_count", 1),
        ("add_feed_forward_length", 32), ("add_head_count", 1), ("add_head_count_kv", 1),
        ("add_layer_norm_rms_eps", 1e-6), ("add_rope_dimension_count", 32),
        ("add_tokenizer_model", "gpt2"), ("add_token_list", tokens), ("add_token_merges", merges),
        ("add_token_types", [CONTROL_TYPE if token in control else 1 for token in tokens]),
        *([("add_tokenizer_pre", pre)] if pre else []), *extra,
        *([("add_bos_token_id", tokens.index("<s>"))] if "<s>" in tokens else []),
    ]:  # fmt: skip
        getattr(writer, method)(*values)
    for name, rows in {"token_embd": len(tokens), "blk.0.attn_norm": 0, "blk.0.ffn_norm": 0, "output_norm": 0}.items():
        writer.add_tensor(f"{name}.weight", np.ones((rows, 32) if rows else 32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((32, 32), np.float32))
    finish(writer)
    return file
