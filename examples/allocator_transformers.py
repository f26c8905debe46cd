"""`generate` of transformers on memory that is mapped as the text grows: python examples/allocator_transformers.py

A small Llama with random weights continues two prompts with three caches. The tokens agree; the memory differs.
"""

import time

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from vattention.transformers import VirtualCache

MAX_TOKENS, NEW_TOKENS = 2048, 40

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=MAX_TOKENS, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompts = torch.randint(1, 1000, (2, 100))


def generate(cache: Cache) -> torch.Tensor:
    start = time.perf_counter()
    tokens = model.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, past_key_values=cache)
    print(f"{type(cache).__name__:12} {time.perf_counter() - start:6.2f} s", end="  ")
    return tokens


def tensor_bytes(cache: Cache) -> int:
    return sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))


dynamic = DynamicCache(config=config)
expected = generate(dynamic)
print(f"{tensor_bytes(dynamic) >> 10:6} KiB, copied anew with each token")

static = StaticCache(config=config, max_cache_len=MAX_TOKENS)
generate(static)
print(f"{tensor_bytes(static) >> 10:6} KiB, from the first token on")

with VirtualCache(config, max_tokens=MAX_TOKENS, budget_bytes=1 << 30) as cache:
    tokens = generate(cache)
    stats = cache.stats()
    print(f"{stats.mapped_bytes >> 10:6} KiB, {stats.wasted_bytes >> 10} of them behind the last token")
assert torch.equal(tokens, expected)
print("same tokens")
