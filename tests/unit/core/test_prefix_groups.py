"""Groups of requests that begin alike, against a search over the token lists."""

import random
from array import array
from collections import defaultdict
from itertools import takewhile

import pytest

from sarathi.core.block_space_manager.prefix_caching import groups
from sarathi.core.block_space_manager.prefix_caching.groups import PrefixGroups, find_groups, saved_tokens
from sarathi.core.block_space_manager.prefix_caching.index import PrefixIndex
from sarathi.messages import PrefixGroup


def most_saved(sequences: list[list[int]]) -> int:
    """All together, or divided by the token that comes next."""
    if len(sequences) < 2:
        return 0
    shared = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))))
    parts: dict[int, list[list[int]]] = defaultdict(list)
    for tokens in sequences:
        if len(tokens) > shared:
            parts[tokens[shared]].append(tokens)
    divided = sum(most_saved(part) for part in parts.values()) if len(parts) > 1 or shared < 1 else 0
    if len(parts) == 1 and any(len(tokens) == shared for tokens in sequences):
        divided = most_saved(next(iter(parts.values())))
    return max(saved_tokens(len(sequences), shared), divided)


def random_sequences(rng: random.Random) -> list[list[int]]:
    """Each begins as an earlier one does, more or less."""
    sequences: list[list[int]] = []
    for _ in range(rng.randint(1, 12)):
        first = rng.choice(sequences) if sequences and rng.random() < 0.8 else []
        sequences.append(first[: rng.randint(0, len(first))] + [rng.randrange(3) for _ in range(rng.randint(1, 9))])
    return sequences


@pytest.mark.parametrize("cost", [0, 3])
def test_groups_share_what_they_claim_and_save_the_most(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_MEMBER_COST", cost)
    monkeypatch.setattr(groups, "_LEAST_SAVED", 1)
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    for _ in range(200):
        sequences, index = random_sequences(rng), PrefixIndex()
        for number, tokens in enumerate(sequences):
            index.insert(number, array("q", tokens))
        running = rng.sample(range(len(sequences)), rng.randint(1, len(sequences)))  # the others are retained
        found = find_groups({number: index.sequences[number].node for number in running})
        members = [member for group in found for member in group.members]
        assert len(set(members)) == len(members) and set(members) <= set(running)
        for group in found:
            starts = {tuple(sequences[member][: group.num_tokens]) for member in group.members}
            assert [len(tokens) for tokens in starts] == [group.num_tokens]
        saved = [saved_tokens(len(group.members), group.num_tokens) for group in found]
        assert saved == sorted(saved, reverse=True)
        assert sum(saved) == most_saved([sequences[number] for number in running])


def test_a_group_needs_much_in_common() -> None:
    index = PrefixIndex()
    for number in range(10):
        index.insert(number, array("q", [*range(4000), number]))
    ends = {number: index.sequences[number].node for number in range(10)}
    assert find_groups(ends) == (PrefixGroup(4000, tuple(range(10))),)
    assert find_groups({number: ends[number] for number in (2, 5)}) == ()
    assert saved_tokens(256, 100) == saved_tokens(1, 100_000) == 0


def test_groups_stay_while_requests_grow_and_are_found_anew_when_they_part() -> None:
    """The second half writes the same tokens for a while."""
    index, groups = PrefixIndex(), PrefixGroups()
    for number in range(20):
        index.insert(number, array("q", [*range(4000), min(number, 10)]))
    for step in range(4):
        for number in range(20):
            index.extend(number, array("q", [step if number < 10 or step < 2 else number]))
            ends = {place: index.sequences[place].node for place in range(20)}
            assert groups.of(ends) == find_groups(ends)
    grown = groups.of(ends)
    for number in range(20):
        index.extend(number, array("q", [number, 7]))
    assert groups.of({place: index.sequences[place].node for place in range(20)}) is grown


def test_groups_are_found_anew_when_requests_change() -> None:
    index, groups = PrefixIndex(), PrefixGroups()
    for number in range(20):
        index.insert(number, array("q", [*range(4000), number]))
    ends = {place: index.sequences[place].node for place in range(20)}
    first = groups.of(ends)
    assert groups.of(dict(ends)) is first
    del ends[3]
    assert groups.of(ends) == (PrefixGroup(4000, tuple(place for place in range(20) if place != 3)),)
