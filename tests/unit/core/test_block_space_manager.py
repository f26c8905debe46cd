"""Both block space managers against a model made of a dict, and what each guarantees beyond it."""

from __future__ import annotations

import random

import pytest
from scheduler_simulation import make_request

from sarathi.config.backend import BackendSpec
from sarathi.core.block_space_manager.base import BlockSpaceError
from sarathi.core.block_space_manager.paged import PagedBlockSpaceManager
from sarathi.core.block_space_manager.prefix_caching.manager import PrefixCachingBlockSpaceManager
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.core.factory import make_block_space_manager
from sarathi.messages import CacheCapacity
from sarathi.request import Request


def test_capacity_arithmetic_is_exact_for_token_sizes_that_do_not_fit_the_page() -> None:
    rng = random.Random(seed := random.randrange(2**32))
    for _ in range(2000):
        capacity = CacheCapacity(10, rng.randint(1, 3000), rng.randint(1, 3000))
        rows, tokens = rng.randint(1, 50), rng.randint(1, 5000)
        most = capacity.tokens_in(rows)
        assert capacity.rows_for(most) <= rows < capacity.rows_for(most + 1), (seed, capacity, rows)
        needed = capacity.rows_for(tokens)
        assert needed * capacity.page_bytes >= tokens * capacity.token_bytes > (needed - 1) * capacity.page_bytes


@pytest.mark.parametrize("name", ["sdpa_paged_4", "sdpa_vattn"])
def test_random_use_agrees_with_a_model(name: str) -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    capacity = CacheCapacity(40, 3, 7) if "vattn" in name else CacheCapacity(40, 1, 4)
    manager = make_block_space_manager(BackendSpec.parse(name), capacity)
    requests = [make_request(f"r{i}", 1) for i in range(12)]
    held = dict.fromkeys(requests, 0)
    rows = 40
    for _ in range(3000):
        request = rng.choice(requests)
        event = rng.random()
        if event < 0.3:
            manager.free(request)
            held[request] = 0
        elif event < 0.33:
            rows = rng.randint(0, 80)
            manager.resize(rows)
        else:
            tokens, spare = rng.randint(1, 60), rng.choice((0, 0, 5))
            wanted = max(held[request], capacity.rows_for(tokens))
            fits = sum(held.values()) - held[request] + wanted + spare <= rows
            grant = manager.allocate(request, tokens, spare)
            assert (grant is not None) == fits
            if grant is not None:
                added = wanted - held[request]
                assert grant.num_tokens >= tokens and capacity.rows_for(grant.num_tokens) == wanted
                assert len(grant.block_ids) == (added if "paged" in name else 0)
                held[request] = wanted
        assert manager.num_used_rows == sum(held.values())
        manager.check_integrity()


def test_the_lowest_blocks_are_given_and_none_twice() -> None:
    manager = PagedBlockSpaceManager(CacheCapacity(6, 1, 4))
    first, second = make_request("a", 1), make_request("b", 1)
    granted = [manager.allocate(request, tokens) for request, tokens in ((first, 5), (second, 4), (first, 12))]
    assert [len(grant.block_ids) for grant in granted if grant] == [2, 1, 1]
    assert sorted(block for grant in granted if grant for block in grant.block_ids) == [0, 1, 2, 3]
    assert manager.allocate(second, 16) is None and manager.num_used_rows == 4, "a refusal changed something"


def test_a_shrunken_capacity_refuses_even_those_who_want_nothing_new_until_it_fits() -> None:
    manager = VirtualBlockSpaceManager(CacheCapacity(10, 1, 1))
    first, second = make_request("a", 1), make_request("b", 1)
    manager.allocate(first, 5)
    manager.allocate(second, 5)
    manager.resize(6)
    assert manager.num_used_rows > manager.capacity.rows and manager.allocate(first, 5) is None
    manager.free(second)
    assert manager.allocate(first, 6) is not None and manager.num_used_rows <= manager.capacity.rows


def start(manager: PrefixCachingBlockSpaceManager, name: str, prompt: list[int]) -> Request:
    """Its prompt is computed in a step that is in flight."""
    request = make_request(name, prompt)
    assert manager.allocate(request, len(prompt)) is not None
    request.num_computed_tokens = len(prompt)
    manager.publish([request])
    return request


def end(manager: PrefixCachingBlockSpaceManager, request: Request, reason: str) -> None:
    manager.end_step([request.request_id])
    request.end(reason)
    manager.free(request)


@pytest.mark.parametrize("reason", ["length", "error"])
def test_rows_behind_those_that_a_step_copies_are_free_when_nobody_uses_them(reason: str) -> None:
    """They were in use when nothing of their sequence could be evicted. reason: how the sequence ended."""
    manager = PrefixCachingBlockSpaceManager(CacheCapacity(6, 1, 16, num_retained=4))
    source = start(manager, "source", [*range(48)])
    shares_two_rows = start(manager, "shares two rows", [*range(32), *range(100, 116)])
    manager.end_step(["shares two rows"])
    shares_one_row = start(manager, "shares one row", [*range(16), *range(200, 216)])
    end(manager, source, reason)
    manager.resize(3)
    manager.resize(6)
    end(manager, shares_two_rows, "error")
    manager.check_integrity()
    assert manager.num_used_rows == 2 and manager.stats.num_retained_rows == 1
    other = start(manager, "other", [*range(300, 364)])
    manager.check_integrity()
    assert manager.num_used_rows == 6 and manager.stats.num_retained_rows == 0
    end(manager, shares_one_row, "error")
    end(manager, other, "error")
    manager.check_integrity()
    assert manager.num_used_rows == 0


def test_inconsistent_accounting_is_noticed() -> None:
    manager = PagedBlockSpaceManager(CacheCapacity(6, 1, 4))
    manager.allocate(make_request("a", 1), 9)
    manager._pool.free.append(manager._blocks["a"][0])
    with pytest.raises(BlockSpaceError):
        manager.check_integrity()
    virtual = VirtualBlockSpaceManager(CacheCapacity(6, 1, 4))
    virtual.allocate(make_request("a", 1), 9)
    virtual.num_used_rows -= 1
    with pytest.raises(BlockSpaceError, match="2 rows are counted, but requests hold 3"):
        virtual.check_integrity()


@pytest.mark.parametrize(("reason", "found"), [("length", 47), ("stop", 47), ("error", 0)])
def test_what_may_be_wrong_is_not_kept_for_others(reason: str, found: int) -> None:
    """Keys and values of a request that ended in an error may be NaN."""
    manager = PrefixCachingBlockSpaceManager(CacheCapacity(6, 1, 16, num_retained=4))
    end(manager, start(manager, "first", [*range(48)]), reason)
    grant = manager.allocate(make_request("second", [*range(48)]), 48)
    assert grant is not None and grant.num_cached_tokens == found
    manager.check_integrity()
