"""The prefix index against a model that compares all sequences token by token."""

from __future__ import annotations

import os
import random
import sys
from array import array
from collections.abc import Callable
from types import FrameType

import pytest

from sarathi.core.block_space_manager.base import BlockSpaceError
from sarathi.core.block_space_manager.prefix_caching.eviction import EvictionQueue, lfu, lru
from sarathi.core.block_space_manager.prefix_caching.index import PrefixIndex

Sequence = tuple["str | None", list[int]]


def common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class Model:
    """Salt and tokens of every owner."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.index = PrefixIndex()
        self.held: dict[int, Sequence] = {}
        self.vocab = rng.choice((1, 2, 3, 50))
        self.salts = rng.choice(((None,), (None, "a", "b")))
        self.num_owners = 0

    def random_tokens(self, salt: str | None) -> list[int]:
        """Often a prefix of a held sequence, of any salt, with other tokens behind it."""
        tokens: list[int] = []
        if self.held and self.rng.random() < 0.7:
            _, other = self.rng.choice(list(self.held.values()))
            tokens = other[: self.rng.randint(0, len(other))]
        return tokens + [self.rng.randrange(self.vocab) for _ in range(self.rng.choice((0, 1, 2, 9)))]

    def play(self, num_events: int) -> None:
        for _ in range(num_events):
            salt = self.rng.choice(self.salts)
            event = self.rng.random()
            if event < 0.35 or not self.held:
                self.insert(salt)
            else:
                owner = self.rng.choice(list(self.held))
                salt, tokens = self.held[owner]
                if event < 0.6:
                    more = self.random_tokens(salt)[len(tokens) // 2 :][:12] if self.rng.random() < 0.5 else [0]
                    self.index.extend(owner, array("q", more))
                    self.held[owner] = (salt, tokens + more)
                elif event < 0.85:
                    length = self.rng.choice((0, self.rng.randint(0, len(tokens) + 1)))
                    self.index.truncate(owner, length)
                    self.held[owner] = (salt, tokens[:length])
                    if not length:
                        del self.held[owner]
                else:
                    self.index.use(owner)
            self.index.check_integrity()
            self.check_match(salt)
        assert {owner: sequence.length for owner, sequence in self.index.sequences.items()} == {
            owner: len(tokens) for owner, (_, tokens) in self.held.items()
        }

    def insert(self, salt: str | None) -> None:
        tokens = self.random_tokens(salt)
        if tokens:
            self.index.insert(self.num_owners, array("q", tokens), salt)
            self.held[self.num_owners] = (salt, tokens)
            self.num_owners += 1

    def check_match(self, salt: str | None) -> None:
        query = self.random_tokens(salt)
        lengths = {owner: common(query, tokens) for owner, (its, tokens) in self.held.items() if its == salt}
        longest = max(lengths.values(), default=0)
        found = self.index.match(array("q", query), salt)
        assert found.num_tokens == longest
        if not longest:
            assert found.owner is None
            return
        assert lengths[found.owner] == longest
        ending = [owner for owner, length in lengths.items() if length == longest == len(self.held[owner][1])]
        assert not ending or found.owner in ending, "a sequence that ends there could be continued in place"


@pytest.mark.parametrize("histories", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_histories_agree_with_the_model(histories: int) -> None:
    start = int(os.environ.get("SEED", random.randrange(2**40)))
    for seed in range(start, start + histories):
        print(f"\rSEED={seed}", end="")  # shown if it fails
        Model(random.Random(seed)).play(random.Random(seed).randint(1, 30))


@pytest.mark.parametrize("policy", [lru, lfu])
def test_the_queue_has_the_order_of_the_policy(policy: Callable[..., tuple[int, ...]]) -> None:
    """Against a search of all entries, while sequences are used, leave and come back."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    index, retained = PrefixIndex(), set()
    queue = EvictionQueue[int](lambda owner: policy(index.sequences[owner]) if owner in retained else None)
    for owner in range(12):
        index.insert(owner, array("q", [owner]))
    for _ in range(3000):
        owner = rng.randrange(12)
        event = rng.random()
        if event < 0.4:
            index.use(owner)
        elif event < 0.6 and owner not in retained:
            retained.add(owner)
            queue.push(owner)
        elif event < 0.7:
            retained.discard(owner)
        elif retained:
            first = queue.first()
            assert first == min(retained, key=lambda each: policy(index.sequences[each]))
            if event < 0.85:
                queue.pop()
                retained.remove(first)
        queue.compact(len(retained))
        assert len(queue) <= 4 * len(retained) + 65


def test_an_owner_holds_one_sequence_and_never_an_empty_one() -> None:
    index = PrefixIndex()
    index.insert("a", array("q", [1]))
    for owner, tokens in (("a", [1]), ("b", [])):
        with pytest.raises(ValueError, match=f"'{owner}' holds a sequence already, or has no tokens"):
            index.insert(owner, array("q", tokens))


def test_a_broken_tree_is_noticed() -> None:
    for attribute, value in (("depth", 7), ("named", "x"), ("owners", set()), ("parent", None)):
        index = PrefixIndex()
        index.insert("a", array("q", [1, 2]))
        setattr(index.sequences["a"].node, attribute, value)
        with pytest.raises(BlockSpaceError):
            index.check_integrity()


def count_lines(call: Callable[[], object]) -> int:
    num_lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., object]:
        nonlocal num_lines
        num_lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return num_lines


def test_a_match_takes_no_python_step_for_each_token() -> None:
    """Nor does a decode that extends its sequence depend on how long that is."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    index = PrefixIndex()
    long = array("q", [rng.randrange(128_000) for _ in range(100_000)])
    index.insert("long", long)
    other = long[:99_000] + array("q", [-1])
    for query, length in ((long, 100_000), (other, 99_000)):
        assert count_lines(lambda query=query: index.match(query)) < 150
        assert index.match(query) == (length, "long")
    assert count_lines(lambda: index.extend("long", array("q", [5]))) < 20
    index.check_integrity()
