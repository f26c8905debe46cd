"""A decode loop over the allocator alone, with torch's attention: python examples/allocator_decode.py

A one-layer "model" with random weights grows four sequences, batched over the cache; each is then computed again from
its tokens alone, without a cache. Both must agree.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from vattention import VirtualKVCache

HEADS, HEAD_SIZE, VOCABULARY, STEPS = 4, 32, 100, 40
torch.manual_seed(0)
embedding = torch.randn(VOCABULARY, HEADS, HEAD_SIZE)
project = {name: torch.randn(HEADS, HEAD_SIZE, HEAD_SIZE) / HEAD_SIZE**0.5 for name in "qkv"}


def heads_of(tokens: torch.Tensor, name: str) -> torch.Tensor:
    """[tokens, heads, head size]"""
    return torch.einsum("thi,hij->thj", embedding[tokens], project[name])


def next_token(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Greedy, by attention of the query [heads, head size] over keys and values [tokens, heads, head size]."""
    mixed = scaled_dot_product_attention(query[:, None], keys.transpose(0, 1), values.transpose(0, 1))
    return int((embedding * mixed[:, 0]).sum((1, 2)).argmax())


def generate(prompts: list[list[int]]) -> list[list[int]]:
    """All sequences together, with K and V in the cache."""
    sequences = [list(prompt) for prompt in prompts]
    with VirtualKVCache(
        num_layers=1, num_kv_heads=HEADS, head_size=HEAD_SIZE, num_slots=len(prompts), max_tokens=4096,
        dtype=torch.float32, budget_bytes=4 << 20,
    ) as cache:  # fmt: skip
        slots = [cache.alloc(len(prompt)) for prompt in prompts]
        written = [0] * len(prompts)
        for _ in range(STEPS):
            lengths = [len(sequence) for sequence in sequences]
            cache.prepare(slots, lengths)
            for i, sequence in enumerate(sequences):
                k, v = cache.view(slots[i], layer=0)
                fresh = torch.tensor(sequence[written[i] :])
                k[written[i] :], v[written[i] :] = heads_of(fresh, "k"), heads_of(fresh, "v")
                written[i] = len(sequence)
                sequence.append(next_token(heads_of(fresh[-1:], "q")[0], k, v))
            cache.prefetch(slots, [length + 1 for length in lengths], lead_tokens=len(slots))
        stats = cache.stats()
    print(f"{stats.peak_mapped_bytes >> 10} KiB mapped at the peak of {stats.reserved_bytes >> 20} MiB of addresses")
    return sequences


def generate_alone(prompt: list[int]) -> list[int]:
    sequence = list(prompt)
    for _ in range(STEPS):
        tokens = torch.tensor(sequence)
        sequence.append(next_token(heads_of(tokens[-1:], "q")[0], heads_of(tokens, "k"), heads_of(tokens, "v")))
    return sequence


if __name__ == "__main__":
    prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in (3, 50, 700, 17)]
    if generate(prompts) != [generate_alone(prompt) for prompt in prompts]:
        raise SystemExit("different tokens with the cache and without")
    print("same tokens with the cache and without")
