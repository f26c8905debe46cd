"""Retained sequences that requests without a hit replace, so that keeping what nobody asks for costs no mapping.

A retained sequence keeps its pages, so the next request needs others, which have to be mapped. Most short prompts never
come again. Once many short sequences are retained that no request has used, each new request replaces the oldest of
them and finds its pages mapped. Where rows are scarce, fewer are kept: the pages that a replaced sequence had beyond
the new prompt stay mapped for its outputs. When a prompt arrives whose beginning was replaced, the following requests
replace nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Generic, TypeVar

SHORT_TOKENS = 4096  # in a longer sequence, mapping is a small part of the time
_KEPT, _KEPT_WHERE_SCARCE = 128, 16  # unused sequences that are not replaced
BEGINNING_TOKENS = 64  # by which a prompt is recognized
_MOST_REPLACED = 4096  # beginnings that are remembered
_PAUSE = 4096  # requests that replace nothing, after the last prompt that came again

Beginning = tuple["str | None", bytes]
Entry = TypeVar("Entry", bound=Hashable)


class UnusedSequences(Generic[Entry]):
    """Short retained sequences that no request has used, the oldest first."""

    def __init__(self) -> None:
        self._beginnings: dict[Entry, Beginning | None] = {}
        self._replaced: dict[Beginning, None] = {}
        self._pause = 0

    def add(self, sequence: Entry, tokens: array[int], salt: str | None) -> None:
        """Add a sequence that is retained from now on."""
        self._beginnings[sequence] = _beginning(tokens, salt)

    def discard(self, sequence: Entry) -> None:
        """A sequence is used, or not retained any more. Unknown ones are ignored."""
        self._beginnings.pop(sequence, None)

    def replace(self, *, is_scarce: bool) -> Entry | None:
        """Remove the sequence that a request without a hit replaces; None where it should replace none.

        is_scarce: fewer are kept.
        """
        if len(self._beginnings) <= (_KEPT_WHERE_SCARCE if is_scarce else _KEPT) or self._pause:
            return None
        sequence, beginning = next(iter(self._beginnings.items()))
        del self._beginnings[sequence]
        if beginning is not None:
            self._replaced[beginning] = None
            if len(self._replaced) > _MOST_REPLACED:
                del self._replaced[next(iter(self._replaced))]
        return sequence

    def note_miss(self, tokens: array[int], salt: str | None) -> None:
        """A request starts of which the cache holds nothing, or less than a beginning."""
        beginning = _beginning(tokens, salt)
        came_again = beginning is not None and beginning in self._replaced
        self._pause = _PAUSE if came_again else max(0, self._pause - 1)


def _beginning(tokens: array[int], salt: str | None) -> Beginning | None:
    """None for what is too short to be worth it."""
    return (salt, tokens[:BEGINNING_TOKENS].tobytes()) if len(tokens) >= BEGINNING_TOKENS else None
