"""Token ids to text as they come, never half a character nor a piece of a stop string.

Work is proportional to the new tokens: the bytes of each go through an incremental UTF-8 decoder, and the text is
released except for the longest tail that could still begin a stop string.
"""

import codecs
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol


class TokenText(Protocol):
    """What a tokenizer offers here."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def special_bytes(self, token_id: int) -> bytes: ...

    def piece(self, token_id: int) -> str: ...


class StopMatcher:
    """Finds the stop string that is complete first; holds back what could begin one.

    The result does not depend on how the text is cut into pieces: of several stop strings the one that ends first is
    found, and of those with the same end the longest. A piece costs as much for thousands of stop strings as for a few.
    keep: whether the stop string itself is released too.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops = frozenset(stops)
        self._in_order = sorted(self._stops)
        self._lengths = sorted({len(stop) for stop in self._stops}, reverse=True)
        self._keep = keep
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, may_match: bool = True) -> str:
        """The part of what is held and `text` that surely belongs to the answer. After a match: nothing.

        may_match: whether a stop string that ends in `text` counts; one that only begins there can end later.
        """
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        num_searched = len(self._held)
        self._held += text
        if may_match:
            self.matched, end = self._first_match(num_searched)
        if self.matched is None:
            return self._release(len(self._held) - self._doubtful())
        released = self._held[: end if self._keep else end - len(self.matched)]
        self._held = ""
        return released

    def flush(self) -> str:
        """What is held, now that nothing more comes."""
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _first_match(self, num_searched: int) -> tuple[str | None, int]:
        """The stop string that ends first, behind what was searched before, and where it ends; else None."""
        text, stops = self._held, self._stops
        for end in range(num_searched + 1, len(text) + 1):
            for length in self._lengths:
                if length <= end and text[end - length : end] in stops:
                    return text[end - length : end], end
        return None, len(text)

    def _doubtful(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = min(len(self._held), self._lengths[0] - 1)
        return next((length for length in range(longest, 0, -1) if self._begins_stop(self._held[-length:])), 0)

    def _begins_stop(self, tail: str) -> bool:
        """Of all stop strings in order, those that begin with `tail` come right behind it."""
        at = bisect_left(self._in_order, tail)
        return at < len(self._in_order) and self._in_order[at].startswith(tail)


class Detokenizer:
    """The text of one growing sequence of tokens. For the parameters see SamplingParams."""

    def __init__(
        self, tokenizer: TokenText, stops: Sequence[str] = (), *, include_stop: bool = False, skip_special: bool = True,
        spaces_between_special: bool = True,
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopMatcher(stops, keep=include_stop) if stops else None
        self._skip_special = skip_special
        self._spaces_between_special = spaces_between_special
        self._after_special = False
        self.matched_stop: str | None = None
        """The stop string that ended the text; nothing after it is part of the text."""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Text that is certain after this token. may_stop: whether a stop string may end in it (min_tokens)."""
        new = self._tokenizer.token_bytes(token_id) if self._skip_special else self._with_special(token_id)
        text = self._utf8.decode(new)
        if self._stops is not None:
            text = self._stops.push(text, may_stop)
            self.matched_stop = self._stops.matched
        return text

    def flush(self) -> str:
        """The rest, when no more tokens come: none after a stop string; else an unfinished character becomes U+FFFD, as
        in one-shot decoding."""
        if self.matched_stop is not None:
            return ""
        held = "" if self._stops is None else self._stops.flush()
        return held + self._utf8.decode(b"", final=True)

    def _with_special(self, token_id: int) -> bytes:
        special = self._tokenizer.special_bytes(token_id)
        if special and self._after_special and not self._spaces_between_special:
            special = self._tokenizer.piece(token_id).encode()
        self._after_special = bool(special)
        return special or self._tokenizer.token_bytes(token_id)


class SilentDetokenizer:
    """For models without a tokenizer, and answers without text."""

    matched_stop: str | None = None

    def push(self, token_id: int, may_stop: bool = True) -> str:
        return ""

    def flush(self) -> str:
        return ""
