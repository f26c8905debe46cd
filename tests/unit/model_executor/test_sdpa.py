"""The sdpa functions against attention by its definition, argument for argument, over random shapes."""

import random

import pytest
import torch
from naive_attention import attention

from sarathi.model_executor.attention.sdpa.backend import flash_attn_varlen_func, flash_attn_with_kvcache

SEEDS = range(12)


class Case:
    """Random sequences; caches full of NaN wherever no token was written, so that reading past a length shows."""

    def __init__(self, seed: int) -> None:
        print(f"seed {seed}")
        torch.manual_seed(seed)
        self.rng = rng = random.Random(seed)
        self.batch, self.kv_heads, self.size = rng.randint(1, 4), rng.choice([1, 2, 3]), rng.choice([4, 16, 64])
        self.heads = self.kv_heads * rng.choice([1, 2, 4])
        self.causal = rng.random() < 0.7
        self.window = rng.choice([(-1, -1), (-1, -1), (rng.randint(0, 9), 0), (rng.randint(0, 5), rng.randint(0, 5))])
        self.scale = rng.choice([None, 0.3])

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.size)

    def expected(self, q, k, v) -> torch.Tensor:
        scale = self.size**-0.5 if self.scale is None else self.scale
        return attention(q, k, v, scale=scale, causal=self.causal, window=self.window)

    @property
    def options(self) -> dict:
        return {"softmax_scale": self.scale, "causal": self.causal, "window_size": self.window}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_with_kvcache_appends_and_attends(seed: int, paged: bool) -> None:
    case = Case(seed)
    rng, batch = case.rng, case.batch
    queries = rng.randint(1, 6)
    lengths = [rng.randint(0, 40) for _ in range(batch)]
    old = [(case.tensor(n, case.kv_heads), case.tensor(n, case.kv_heads)) for n in lengths]
    q = case.tensor(batch, queries, case.heads)
    k, v = case.tensor(batch, queries, case.kv_heads), case.tensor(batch, queries, case.kv_heads)
    k_cache, v_cache, where = (paged_caches if paged else slot_caches)(case, old, lengths, queries)
    found = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(lengths, dtype=torch.int32), **where, **case.options
    )
    for i in range(batch):
        assert_close(found[i], case.expected(q[i], torch.cat((old[i][0], k[i])), torch.cat((old[i][1], v[i]))))


@pytest.mark.parametrize("seed", SEEDS)
def test_with_kvcache_reads_what_is_there_without_new_keys(seed: int) -> None:
    case = Case(seed)
    lengths = [case.rng.randint(3, 40) for _ in range(case.batch)]
    old = [(case.tensor(n, case.kv_heads), case.tensor(n, case.kv_heads)) for n in lengths]
    q = case.tensor(case.batch, 3, case.heads)
    k_cache, v_cache, where = slot_caches(case, old, lengths, 0)
    found = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=torch.tensor(lengths), **where, **case.options)
    for i in range(case.batch):
        assert_close(found[i], case.expected(q[i], *old[i]))


@pytest.mark.parametrize("seed", SEEDS)
def test_varlen_keeps_sequences_apart(seed: int) -> None:
    case = Case(seed)
    counts = [case.rng.randint(1, 7) for _ in range(case.batch)]
    lengths = [count + case.rng.randint(0, 20) for count in counts]
    q, k, v = (
        case.tensor(sum(n), h) for n, h in ((counts, case.heads), (lengths, case.kv_heads), (lengths, case.kv_heads))
    )
    ends_q, ends_k = ([sum(n[:i]) for i in range(case.batch + 1)] for n in (counts, lengths))
    found = flash_attn_varlen_func(q, k, v, torch.tensor(ends_q), torch.tensor(ends_k), **case.options)
    for i in range(case.batch):
        here, there = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        assert_close(found[here], case.expected(q[here], k[there], v[there]))


@pytest.mark.parametrize("seed", SEEDS)
def test_varlen_through_a_block_table(seed: int) -> None:
    case = Case(seed)
    counts = [case.rng.randint(1, 7) for _ in range(case.batch)]
    lengths = [count + case.rng.randint(0, 20) for count in counts]
    old = [(case.tensor(n, case.kv_heads), case.tensor(n, case.kv_heads)) for n in lengths]
    k_cache, v_cache, where = paged_caches(case, old, lengths, 0)
    q = case.tensor(sum(counts), case.heads)
    ends_q, ends_k = ([sum(n[:i]) for i in range(case.batch + 1)] for n in (counts, lengths))
    found = flash_attn_varlen_func(
        q, k_cache, v_cache, torch.tensor(ends_q), torch.tensor(ends_k), **where, **case.options
    )
    for i in range(case.batch):
        here = slice(ends_q[i], ends_q[i + 1])
        assert_close(found[here], case.expected(q[here], *old[i]))


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 2, 2, 8)
    found = flash_attn_with_kvcache(q, k, k, cache_seqlens=torch.tensor([2]), causal=True)
    assert not found[0, :3].any() and found[0, 3:].any()
    assert_close(found[0], attention(q[0], k[0], k[0], scale=8**-0.5, causal=True, window=(-1, -1)))


def slot_caches(case: Case, old: list, lengths: list[int], room: int) -> tuple:
    """Sequences in shuffled rows of a cache whose tokens are strided, as in a megacache."""
    slots = case.rng.sample(range(case.batch + 2), case.batch)
    shape = (case.batch + 2, max(lengths) + room + 3, 2, case.kv_heads, case.size)
    caches = [torch.full(shape, float("nan"))[:, :, 1] for _ in range(2)]
    for cache, kept in zip(caches, zip(*old, strict=True), strict=True):
        for slot, tokens in zip(slots, kept, strict=True):
            cache[slot, : len(tokens)] = tokens
    return *caches, {"cache_batch_idx": torch.tensor(slots, dtype=torch.int32)}


def paged_caches(case: Case, old: list, lengths: list[int], room: int) -> tuple:
    """Sequences in shuffled blocks."""
    size = case.rng.choice([1, 4, 16])
    width = -(-(max(lengths) + room) // size)
    blocks = case.rng.sample(range(case.batch * width + 3), case.batch * width)
    table = torch.tensor(blocks, dtype=torch.int32).view(case.batch, width)
    caches = [torch.full((len(blocks) + 3, size, case.kv_heads, case.size), float("nan")) for _ in range(2)]
    for cache, kept in zip(caches, zip(*old, strict=True), strict=True):
        for row, tokens in zip(table.tolist(), kept, strict=True):
            for position, token in enumerate(tokens):
                cache[row[position // size], position % size] = token
    return *caches, {"block_table": table}
