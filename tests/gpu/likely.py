"""A small Llama in bf16, and whether its outputs are what float32 logits of transformers find likely."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

CLOSE = 0.1  # of the spread of the logits: bf16 sums in another order


def save_llama(folder: Path) -> str:
    """Random weights of 4 layers with 2 KV heads; the folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=1001, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return str(folder)


def prompts() -> list[list[int]]:
    """Five of other lengths, the same ones at every call."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 1001, (length,), generator=generator).tolist() for length in (1, 7, 64, 300, 900)]


def check_likely(folder: str, outputs: list[list[int]], note: str, asked: list[list[int]] | None = None) -> None:
    """Every token against float32 logits of transformers, given the tokens before it. asked: None: `prompts`."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    for prompt, output in zip(asked or prompts(), outputs, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *output]], device=reference.device)).logits[
                0, len(prompt) - 1 : -1
            ]
        chosen = logits.gather(1, torch.tensor(output, device=reference.device).unsqueeze(1)).squeeze(1)
        behind = (logits.amax(1) - chosen) / (logits.amax(1) - logits.amin(1))
        assert behind.max() < CLOSE, (note, behind)
