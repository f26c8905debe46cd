"""Prefix index: finds the sequence in the KV cache that shares the longest prefix with a request.

A radix tree over token ids, compressed so that every node except a root ends a sequence or has at least two children.
A sequence is a point of the tree: the node where its computed tokens end. All sequences below a node begin with the
tokens on the path to it, so a prefix that ends inside an edge is held by every sequence below that edge. Each node
names one of them, which makes a lookup O(length of the prompt) with array comparisons and no step for each token.

    (root) --[the quick]--> node --[brown fox]--> node        sequences: a ends at the left node, b at the right one
                            owner a               owner b      "the quick bro.." matches b, with 9 + 4 tokens
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from sarathi.core.block_space_manager.base import BlockSpaceError

Owner = Hashable  # who holds a sequence


class Match(NamedTuple):
    """The longest indexed prefix of a request.

    num_tokens: its length. owner: a sequence that begins with it; None if num_tokens is 0. It ends exactly there if any
    sequence does, so that it can be continued in place.
    """

    num_tokens: int
    owner: Owner | None


@dataclass(eq=False, slots=True)
class _Node:
    """tokens: of the edge that leads here. depth: tokens from the root to the end of that edge.

    owners: sequences that end here, in an order that is the same in every run. named: the sequence below that the node
    names.
    """

    tokens: array[int]
    parent: _Node | None
    depth: int
    named: Owner | None = None
    owners: dict[Owner, None] = field(default_factory=dict)
    children: dict[int, _Node] = field(default_factory=dict)

    def choose(self) -> None:
        """Name a sequence: one that ends here, else one of a child."""
        self.named = next(iter(self.owners)) if self.owners else next(iter(self.children.values())).named


@dataclass(eq=False, slots=True)
class IndexedSequence:
    """A sequence and its use. last_used: number of the last call that inserted, extended or used it."""

    node: _Node
    salt: str | None
    last_used: int
    num_uses: int = 0

    @property
    def length(self) -> int:
        return self.node.depth


class PrefixIndex:
    """The computed tokens of every sequence in the cache. Sequences of different salts never match."""

    def __init__(self) -> None:
        self.sequences: dict[Owner, IndexedSequence] = {}
        self._roots: dict[str | None, _Node] = {}
        self._clock = itertools.count()

    def match(self, tokens: array[int], salt: str | None = None) -> Match:
        """The longest prefix of `tokens` in the index. O(len(tokens))."""
        node, position = self._roots.get(salt), 0
        if node is None:
            return Match(0, None)
        while position < len(tokens) and (child := node.children.get(tokens[position])) is not None:
            node = child
            length = _common_length(child.tokens, tokens, position)
            position += length
            if length < len(child.tokens):
                break
        return Match(position, node.named if position else None)

    def length(self, owner: Owner) -> int:
        """Tokens of a sequence that can be found; 0 where there is none of this owner."""
        sequence = self.sequences.get(owner)
        return sequence.node.depth if sequence is not None else 0

    def use(self, owner: Owner) -> None:
        """Count a hit of a sequence, for the eviction policies."""
        sequence = self.sequences[owner]
        sequence.num_uses += 1
        sequence.last_used = next(self._clock)

    def insert(self, owner: Owner, tokens: array[int], salt: str | None = None) -> None:
        """Add a sequence. ValueError if it has no tokens, or if the owner has one already."""
        if owner in self.sequences or not tokens:
            raise ValueError(f"{owner!r} holds a sequence already, or has no tokens: {len(tokens)}")
        root = self._roots.setdefault(salt, _Node(array("q"), None, 0))
        self.sequences[owner] = IndexedSequence(self._place(owner, root, tokens, 0), salt, next(self._clock))

    def extend(self, owner: Owner, tokens: array[int]) -> None:
        """Append computed tokens to a sequence. O(len(tokens)) if no other sequence shares its end."""
        sequence = self.sequences[owner]
        sequence.last_used = next(self._clock)
        node = sequence.node
        if not node.children and len(node.owners) == 1:
            node.tokens.extend(tokens)
            node.depth += len(tokens)
        elif tokens:
            node.owners.pop(owner, None)
            sequence.node = self._place(owner, node, tokens, 0)
            self._tidy(node, owner, until=node.parent)

    def truncate(self, owner: Owner, length: int) -> None:
        """Forget the tokens of a sequence from `length` on; all of it if `length` is 0."""
        sequence = self.sequences[owner]
        old = node = sequence.node
        if length >= old.depth:
            return
        if length <= 0:
            self.discard(owner)
            return
        old.owners.pop(owner, None)
        while node.parent is not None and node.parent.depth >= length:
            node = node.parent
        sequence.node = self._end_at(owner, node, length - (node.depth - len(node.tokens)))
        self._tidy(old, owner, until=sequence.node)

    def discard(self, owner: Owner) -> None:
        """Forget a sequence, if there is one of this owner."""
        sequence = self.sequences.pop(owner, None)
        if sequence is None:
            return
        sequence.node.owners.pop(owner, None)
        self._tidy(sequence.node, owner, until=None)
        if not self._roots[sequence.salt].children:
            del self._roots[sequence.salt]

    def check_integrity(self) -> None:
        """Raise BlockSpaceError unless tree and sequences agree."""
        ends: dict[Owner, _Node] = {}
        for root in self._roots.values():
            if root.tokens or root.owners or root.parent or not root.children:
                raise BlockSpaceError("a root has tokens, owners or a parent, or no children")
            for child in root.children.values():
                _check_subtree(child, ends)
        if ends != {owner: sequence.node for owner, sequence in self.sequences.items()}:
            raise BlockSpaceError(f"sequences end at other nodes than recorded: {ends.keys()}")

    def _place(self, owner: Owner, node: _Node, tokens: array[int], position: int) -> _Node:
        """The node where the path from the end of `node` through tokens[position:] ends, created if necessary."""
        while position < len(tokens):
            child = node.children.get(tokens[position])
            if child is None:
                rest = tokens[position:]
                leaf = _Node(rest, node, node.depth + len(rest), owner, {owner: None})
                node.children[rest[0]] = leaf
                return leaf
            length = _common_length(child.tokens, tokens, position)
            position += length
            node = child if length == len(child.tokens) else _split(child, length)
        node.owners[owner] = None
        node.choose()
        return node

    def _end_at(self, owner: Owner, node: _Node, length: int) -> _Node:
        """Let a sequence end after `length` tokens of the edge to `node`."""
        end = node if length == len(node.tokens) else _split(node, length)
        end.owners[owner] = None
        end.choose()
        return end

    def _tidy(self, node: _Node | None, owner: Owner, until: _Node | None) -> None:
        """Restore the nodes from `node` up to, but without, `until`, below which `owner` has left."""
        while node is not None and node is not until:
            parent = node.parent
            if parent is not None and not node.owners and len(node.children) < 2:
                _drop(node, parent)
            elif node.named == owner and parent is not None:
                node.choose()
            node = parent


def _common_length(edge: array[int], tokens: array[int], start: int) -> int:
    """Length of the common prefix of `edge` and tokens[start:], by comparing halves: O(length), few Python steps."""
    low, high = 0, min(len(edge), len(tokens) - start)
    if edge[:high] == tokens[start : start + high]:
        return high
    while high - low > 1:  # edge[:low] is common, edge[:high] is not
        middle = (low + high) // 2
        if edge[low:middle] == tokens[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return low


def _split(node: _Node, length: int) -> _Node:
    """Divide the edge to `node` after `length` tokens; returns the new node there."""
    parent = node.parent
    assert parent is not None
    upper = _Node(node.tokens[:length], parent, parent.depth + length, node.named)
    parent.children[upper.tokens[0]] = upper
    del node.tokens[:length]
    node.parent = upper
    upper.children[node.tokens[0]] = node
    return upper


def _drop(node: _Node, parent: _Node) -> None:
    """Remove a node at which nothing ends: without children altogether, with one by joining their edges."""
    if not node.children:
        del parent.children[node.tokens[0]]
        return
    (child,) = node.children.values()
    child.tokens = node.tokens + child.tokens
    child.parent = parent
    parent.children[child.tokens[0]] = child


def _check_subtree(top: _Node, ends: dict[Owner, _Node]) -> None:
    """Check the nodes below `top`, and collect where sequences end."""
    order = [top]
    for node in order:
        order += node.children.values()
    below: dict[int, set[Owner]] = {}
    for node in reversed(order):
        held = set(node.owners).union(*[below.pop(id(child)) for child in node.children.values()])
        below[id(node)] = held
        ends.update(dict.fromkeys(node.owners, node))
        is_linked = node.parent is not None and node.parent.children[node.tokens[0]] is node
        if not is_linked or node.parent is None or node.depth != node.parent.depth + len(node.tokens):
            raise BlockSpaceError(f"a node at depth {node.depth} is linked to no parent, or has another depth")
        if not node.owners and len(node.children) < 2:
            raise BlockSpaceError(f"a node at depth {node.depth} ends no sequence and does not branch")
        if node.named not in (node.owners or held):
            raise BlockSpaceError(f"a node at depth {node.depth} names {node.named!r}, which does not hold its tokens")
