"""Sequences of ended requests: how many are kept, since slots take addresses, and who goes on in their slots."""

import pytest
import torch

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk, PrefixChanges, SharedPrefix
from sarathi.worker.cache_engine.base import CacheEngine, KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine, num_retained


def smollm2(max_num_seqs: int) -> KVCacheSpec:
    return KVCacheSpec(30, 3, 64, torch.float32, max_num_seqs, 2048, 0)


def llama_8b(max_num_seqs: int, max_model_len: int) -> KVCacheSpec:
    return KVCacheSpec(32, 8, 128, torch.bfloat16, max_num_seqs, max_model_len, 0)


@pytest.mark.parametrize(
    ("backend", "device", "spec", "expected"),
    [
        ("sdpa_paged_16", "cpu", smollm2(1000), 4000),
        ("sdpa_vattn_megacache", "cpu", smollm2(128), 512),
        ("sdpa_vattn", "cpu", smollm2(50), 200),
        ("sdpa_vattn", "cpu", smollm2(128), 40_000 // 120 - 128),  # two areas in each of 60 regions
        ("sdpa_vattn", "cpu", smollm2(200), 200),
        ("sdpa_vattn", "cpu", smollm2(256), 0),  # 512 slots have 61,440 areas
        ("fa_vattn", "cuda", llama_8b(128, 2**17), 512),
        ("fa_vattn_megacache", "cuda", llama_8b(128, 2**15), 2**39 // 2**31 - 128),
        ("fa_vattn_megacache", "cuda", llama_8b(64, 2**17), 64),
        ("fa_vattn_megacache", "cuda", llama_8b(128, 2**17), 0),  # 256 slots of 8 GiB: 2 TiB a region
        ("fa_vattn", "cuda", llama_8b(2100, 2**17), 0),  # 4,200 slots of 16 GiB in all regions: more than 64 TiB
    ],
)
def test_as_many_as_may_run_at_least_or_none(backend: str, device: str, spec: KVCacheSpec, expected: int) -> None:
    assert num_retained(BackendSpec.parse(backend), spec, torch.device(device)) == expected


def small_cache(backend: str) -> CacheEngine:
    spec = KVCacheSpec(2, 1, 64, torch.float32, 4, 512, 0, num_retained=4)
    return create_cache_engine(BackendSpec.parse(backend), spec, torch.device("cpu"), 1 << 20)


def cache_after_sharing(backend: str) -> CacheEngine:
    """Request "second" goes on in the slot of a sequence of 64 tokens, whose first 48 an idle slot maps too."""
    cache = small_cache(backend)
    cache.prepare([Chunk("first", 0, 64, True, 64)])
    cache.prepare([Chunk("sharer", 48, 1, True, 64)], [SharedPrefix("sharer", "first", 48, 48)])
    cache.release(["sharer"], PrefixChanges(retained=(("first", 1),), continued=(("second", 1),)))
    return cache


@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb"])
def test_a_request_that_goes_on_where_others_shared_clears_all_that_it_has_written(backend: str) -> None:
    """Its logits were not finite. The tokens that the slot's last owner shared are this request's from its start on."""
    cache = cache_after_sharing(backend)
    cache.prepare([Chunk("second", 16, 8, True, 24)])
    slot = cache.address([Chunk("second", 16, 8, True, 24)]).slots[0]
    layers = [tensor for index in range(2) for tensor in cache.layer(index)]
    for tensor in layers:
        tensor[slot, :16], tensor[slot, 16:24] = 1.0, torch.nan
    cache.clear(["second"])
    for tensor in layers:
        assert tensor[slot, :16].eq(1).all() and tensor[slot, 16:24].eq(0).all()
    cache.close()


@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb"])
def test_requests_that_go_on_in_one_step_have_the_slots_of_their_own_sequences(backend: str) -> None:
    cache = small_cache(backend)
    chunks = [Chunk(name, 0, 64, True, 64) for name in ("first", "second")]
    cache.prepare(chunks)
    slots = cache.address(chunks).slots
    cache.release([], PrefixChanges(retained=(("first", 1), ("second", 2)), continued=(("third", 2), ("fourth", 1))))
    assert cache.address([chunks[0]._replace(request_id=name) for name in ("fourth", "third")]).slots == slots
    cache.close()


@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb"])
def test_a_step_that_is_taken_back_leaves_what_was_computed_before(backend: str) -> None:
    cache = small_cache(backend)
    for start, end in ((0, 100), (100, 300)):
        chunk = Chunk("a", start, end - start, True, end)
        cache.prepare([chunk])
    cache.cancel([chunk])
    num_tokens, num_prepared = cache.lengths()["a"]
    assert num_tokens == 100 <= num_prepared < 300
    cache.check_integrity()
    cache.close()


@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb"])
def test_a_step_that_is_taken_back_may_begin_within_a_page_that_an_idle_slot_maps_too(backend: str) -> None:
    """The slot of a sharer that has ended keeps its pages until another request takes it."""
    cache = cache_after_sharing(backend)
    chunk = Chunk("second", 41, 8, True, 300)
    cache.prepare([chunk])
    cache.cancel([chunk])
    num_tokens, num_prepared = cache.lengths()["second"]
    assert num_tokens == 41 <= num_prepared <= 64
    cache.check_integrity()
    cache.close()
