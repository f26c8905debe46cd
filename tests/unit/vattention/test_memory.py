"""What memory the class holds and when: reclamation, prefetch, sharing, budgets, the pool, and the statistics of it."""

import pytest
import torch

from vattention import OutOfMemoryError, VirtualKVCache

PAGE = 4096


def make(rows: int = 64, **changes) -> VirtualKVCache:
    """A token is 128 bytes in a region, a row 32 tokens, a slot 32 rows."""
    return VirtualKVCache(
        num_layers=2,
        num_kv_heads=2,
        head_size=32,
        num_slots=4,
        max_tokens=1024,
        dtype=torch.float16,
        page_bytes=PAGE,
        budget_bytes=rows * 4 * PAGE,
        **changes,
    )


def test_deferred_reclamation_reuses_without_mapping():
    with make() as cache:
        for _ in range(5):
            slot = cache.alloc(300)
            cache.prepare([slot], [300])
            cache.free(slot)
        assert cache.stats().prepares_waited == 1


def test_without_deferral_memory_returns_at_once():
    with make(deferred_reclamation=False) as cache:
        slot = cache.alloc(300)
        cache.prepare([slot], [300])
        cache.free(slot)
        assert cache.stats().mapped_bytes == 0
        cache.set_deferred_reclamation(True)
        slot = cache.alloc(300)
        cache.prepare([slot], [300])
        cache.free(slot)
        assert cache.stats().mapped_bytes == cache.stats().idle_bytes == 10 * cache.row_bytes
        cache.reclaim_idle()
        assert cache.stats().mapped_bytes == 0


def test_prefetch_maps_beside_the_step():
    with make() as cache:
        slot = cache.alloc()
        cache.prepare([slot], [32])
        cache.prefetch([slot], [33])
        cache.wait()
        before = cache.stats()
        cache.prepare([slot], [33])
        after = cache.stats()
        assert before.rows_prefetched == 1 and after.prepares_waited == before.prepares_waited
        assert after.calls == before.calls


def test_pages_that_are_due_together_are_mapped_one_a_step():
    """Token 33 needs a second page in every slot: by then all have it, and no step waited for more than its own."""
    with make() as cache:
        slots = [cache.alloc() for _ in range(4)]
        for length in range(28, 33):
            cache.prepare(slots, [length] * 4)
            cache.prefetch(slots, [length + 1] * 4, lead_tokens=4)
            cache.wait()
        assert [cache.slot_state(slot)[2] for slot in slots] == [2] * 4
        before = cache.stats()
        cache.prepare(slots, [33] * 4)
        assert cache.stats().prepares_waited == before.prepares_waited
        with pytest.raises(ValueError, match="-1"):
            cache.prefetch(slots, [34] * 4, lead_tokens=-1)


def test_prefetch_past_the_end_is_cut_and_without_room_is_counted():
    with make(rows=33) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.prepare([a], [1024])
        cache.prefetch([a], [1025])
        cache.prepare([b], [32])
        cache.prefetch([b], [33])
        assert cache.stats().prefetches_short == 1
        with pytest.raises(ValueError):
            cache.prefetch([3], [1])


def test_share_then_diverge():
    with make() as cache:
        source, target = cache.alloc(), cache.alloc()
        cache.prepare([source], [700])
        k, _ = cache.layer(1)
        k[source, :700] = torch.arange(700).view(-1, 1, 1).half()
        shared = cache.share(source, target, 700)
        assert shared == 672 and cache.slot_state(target)[1] == 672  # 21 whole rows; the 22nd is not full
        assert cache.stats().mapped_bytes == 22 * cache.row_bytes
        cache.prepare([target], [700])
        k[target, 672:700] = -1
        assert torch.equal(k[source, :700, 0, 0], torch.arange(700).half())
        cache.free(source)
        fresh = cache.alloc(700)
        cache.prepare([fresh], [700])
        k[fresh, :700] = 5
        assert torch.equal(k[target, :672, 0, 0], torch.arange(672).half())
        cache.check_integrity()


def test_share_refuses_what_would_corrupt():
    with make() as cache:
        source, target = cache.alloc(), cache.alloc()
        cache.prepare([source, target], [64, 1])
        with pytest.raises(ValueError, match="without prepared tokens"):
            cache.share(source, target, 64)
        with pytest.raises(ValueError, match="without prepared tokens"):
            cache.share(source, source, 64)
        other = cache.alloc()
        with pytest.raises(ValueError, match="holds 64"):
            cache.share(source, other, 65)
        assert cache.share(source, other, 31) == 0


def test_a_trimmed_slot_keeps_its_first_tokens_and_frees_the_rest():
    with make(rows=32) as cache:
        slot, other = cache.alloc(), cache.alloc()
        cache.prepare([slot], [1000])
        k, _ = cache.view(slot, 1)
        k.copy_(torch.arange(1000).view(-1, 1, 1).expand(1000, 2, 32))
        assert cache.trim(slot, 333) == 333 == cache.slot_state(slot)[1]
        cache.prepare([other], [21 * 32])
        cache.view(other, 1)[0].fill_(-1)
        assert torch.equal(cache.view(slot, 1)[0][:, 0, 0], torch.arange(333).half())
        with pytest.raises(OutOfMemoryError):
            cache.prepare([slot], [11 * 32 + 1])
        with pytest.raises(ValueError, match="not allocated"):
            cache.trim(3, 0)
        cache.check_integrity()


def test_resize_down_and_up():
    with make(rows=64) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.prepare([a, b], [320, 1024])
        cache.free(b)
        with pytest.raises(OutOfMemoryError):
            cache.resize(9 * cache.row_bytes)
        assert cache.capacity_rows == 64
        cache.resize(10 * cache.row_bytes + 1)
        assert cache.capacity_rows == 10 and cache.stats().created_bytes == 10 * cache.row_bytes
        cache.resize(40 * cache.row_bytes)
        cache.prepare([a], [1024])
        with pytest.raises(ValueError, match="budget_bytes"):
            cache.resize(-1)


def test_the_pool_can_be_created_ahead_or_lazily():
    with make(rows=64) as lazy, make(rows=64) as ahead:
        assert lazy.stats().created_bytes == 0
        ahead.fill_pool(1 << 40)
        assert ahead.stats().created_bytes == 64 * ahead.row_bytes and ahead.stats().mapped_bytes == 0
        for cache in (lazy, ahead):
            slot = cache.alloc()
            cache.prepare([slot], [1])
        assert lazy.stats().calls["create"] == 4
        assert ahead.stats().calls["create"] == ahead.stats().created_bytes // PAGE - sum(
            (rows - 1) * count * 4 for rows, count in ahead.stats().pooled_extents.items()
        )


def test_statistics_add_up():
    with make(rows=64) as cache:
        a, b = cache.alloc(), cache.alloc()
        cache.prepare([a, b], [33, 100])
        cache.free(b)
        stats = cache.stats()
        assert stats.mapped_bytes == 6 * cache.row_bytes and stats.idle_bytes == 4 * cache.row_bytes
        assert stats.wasted_bytes == 2 * cache.row_bytes - 33 * 128 * 4
        assert stats.capacity_bytes == 64 * cache.row_bytes
        assert stats.reserved_bytes == 4 * 4 * 32 * PAGE
        assert stats.driver_calls == sum(stats.calls.values()) and stats.driver_s > 0
        cache.reclaim_idle()
        assert cache.stats().peak_mapped_bytes == 6 * cache.row_bytes
