"""One system prompt in memory for many sequences: python examples/allocator_share.py"""

import torch

from vattention import VirtualKVCache

PREFIX, OWN = 1000, 60

with VirtualKVCache(
    num_layers=8, num_kv_heads=4, head_size=64, num_slots=16, max_tokens=8192, dtype=torch.float16,
    budget_bytes=256 << 20,
) as cache:  # fmt: skip
    first = cache.alloc(PREFIX)
    cache.prepare([first], [PREFIX])
    cache.view(first, 0)[0].copy_(torch.randn(PREFIX, 4, 64))  # as the prompt's prefill would
    one = cache.stats().mapped_bytes

    others = [cache.alloc() for _ in range(15)]
    shared = [cache.share(first, slot, PREFIX) for slot in others]
    cache.prepare(others, [PREFIX + OWN] * 15)  # each writes behind the shared tokens only

    k = cache.view(first, 0)[0]
    assert all(torch.equal(cache.view(slot, 0)[0][: shared[0]], k[: shared[0]]) for slot in others)
    apart = 16 * cache.rows_for(PREFIX + OWN) * cache.row_bytes
    print(f"{shared[0]} of {PREFIX} tokens shared by 16 sequences")
    print(f"{one >> 20} MiB for one, {cache.stats().mapped_bytes >> 20} MiB for 16, {apart >> 20} MiB without sharing")
