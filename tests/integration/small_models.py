"""Model folders small enough to be written in a test: random weights, a tokenizer of one token a byte.

The weights of a dummy model are so small that it repeats one token, whatever its KV cache holds. Those written here are
large: greedy outputs vary, and one wrong key or value of a prompt changes most of them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}
NUM_LETTERS = 94  # tokens that are printable ASCII, the first ones of the alphabet
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def save_tiny_config(folder: Path, **changes: Any) -> str:
    """A folder with a configuration alone: dummy weights, token ids."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return str(folder)


def save_tiny_tokenizer(folder: Path) -> None:
    """Bytes as tokens, <end> as the end, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_tiny_weights(folder: Path) -> None:
    """Random weights of standard deviation 0.25, the same ones every time."""
    torch.manual_seed(1)
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: 0.25 * torch.randn(shape) for name, shape in _shapes(config)}
    tensors |= {name: 1.0 + tensor for name, tensor in tensors.items() if name.endswith("norm.weight")}
    tensors["lm_head.weight"][NUM_LETTERS:] = 0.0
    save_file(tensors, folder / "model.safetensors")


def _shapes(config: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    attention = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        yield from ((f"{layer}self_attn.{name}_proj.weight", shape) for name, shape in attention.items())
        yield from ((f"{layer}mlp.{name}_proj.weight", shape) for name, shape in mlp.items())
        yield from ((f"{layer}{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    yield from {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}.items()
    yield "lm_head.weight", (vocab, hidden)


def save_tiny_model(folder: Path, **changes: Any) -> str:
    """A folder with weights that can be chatted with. Greedy outputs are one printable letter a token."""
    name = save_tiny_config(folder, **{"tie_word_embeddings": False, **changes})
    save_tiny_weights(folder)
    save_tiny_tokenizer(folder)
    return name
