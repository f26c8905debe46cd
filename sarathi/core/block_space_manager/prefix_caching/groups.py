"""Which requests of a step begin alike, so that attention may read what they share once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from sarathi.messages import PrefixGroup

# In tokens that could be read in that time, from experiments/h200/shared.csv.
_LEAST_SAVED = 32_768  # the launch of another kernel
_MEMBER_COST = 300  # the join of a member's two parts


class Node(Protocol):
    """A node of the prefix index: all sequences below it begin with the same `depth` tokens."""

    @property
    def depth(self) -> int: ...

    @property
    def parent(self) -> Node | None: ...


class _Found(NamedTuple):
    saved: int = 0
    groups: tuple[PrefixGroup, ...] = ()


def saved_tokens(num_members: int, num_tokens: int) -> int:
    """Tokens whose keys and values a layer need not read when num_members requests share num_tokens; at least 0.

    Reading once saves all members but one the prefix, and costs each of them the join of its own tokens with it.
    """
    return max(0, (num_members - 1) * num_tokens - num_members * _MEMBER_COST)


def find_groups(ends: Mapping[int, Node]) -> tuple[PrefixGroup, ...]:
    """Disjoint groups of requests that save most together, the largest saving first; none if they save too little.

    ends: the node where a request's tokens end in the prefix index, by the index of its chunk. From the leaves up, a
    node's requests are one group, or those groups that were found below it, whichever saves more.
    """
    members: dict[Node, list[int]] = defaultdict(list)
    found: dict[Node, _Found] = defaultdict(_Found)
    chosen = _Found()
    for index, node in ends.items():
        members[node].append(index)
    for node in sorted(_with_parents(members), key=_depth, reverse=True):
        best = _better(found.pop(node, _Found()), members[node], node.depth)
        if node.parent is None:
            chosen = _both(chosen, best)
        else:
            members[node.parent] += members.pop(node)
            found[node.parent] = _both(found[node.parent], best)
    if chosen.saved < _LEAST_SAVED:
        return ()
    return tuple(sorted(chosen.groups, key=lambda group: -saved_tokens(len(group.members), group.num_tokens)))


def _better(below: _Found, members: list[int], num_tokens: int) -> _Found:
    saved = saved_tokens(len(members), num_tokens)
    return _Found(saved, (PrefixGroup(num_tokens, tuple(sorted(members))),)) if saved > below.saved else below


def _both(first: _Found, second: _Found) -> _Found:
    return _Found(first.saved + second.saved, first.groups + second.groups)


def _with_parents(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and all above them."""
    seen: set[Node] = set()
    for node in nodes:
        above: Node | None = node
        while above is not None and above not in seen:
            seen.add(above)
            above = above.parent
    return seen


def _depth(node: Node) -> int:
    return node.depth


class PrefixGroups:
    """The groups of a step, found anew when other requests decode than in the step before, or begin alike.

    A node grows while one request ends there and nothing is below it; what requests share has nodes that do not grow.
    """

    def __init__(self) -> None:
        self._key: list[tuple[int, Node, Node | None]] = []
        self._groups: tuple[PrefixGroup, ...] = ()

    def of(self, ends: Mapping[int, Node]) -> tuple[PrefixGroup, ...]:
        """See find_groups."""
        key = [(index, node, node.parent) for index, node in ends.items()]
        if key != self._key:
            self._key, self._groups = key, find_groups(ends)
        return self._groups
