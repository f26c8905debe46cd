"""Token ids to text as they come, never half a character nor a piece of a stop string; knows no requests.

Work is proportional to the new tokens: bytes of each go through an incremental UTF-8 decoder, and text goes on except
for the longest tail that could still begin a stop string.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What a tokenizer offers here."""

    def token_bytes(self, token_id: int) -> bytes: ...


class StopMatcher:
    """Finds the stop string that is complete first; holds back what could begin one.

    The result does not depend on how the text is cut into pieces: of several stop strings the one whose end comes
    first wins, and of those with the same end the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of what is held and `text` that surely belongs to the answer. After a match: nothing."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return self._release(len(self._held) - self._doubtful())
        _end, start, self.matched = min(found)
        released, self._held = self._held[:start], ""
        return released

    def flush(self) -> str:
        """What is held, now that nothing more comes."""
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _doubtful(self) -> int:
        """Length of the longest tail that begins a stop string."""
        return max((_overlap(self._held, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)


class Detokenizer:
    """The text of one growing sequence of tokens."""

    def __init__(self, tokenizer: TokenBytes, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = StopMatcher(stops)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text; neither it nor anything after it is part of the text."""
        return self._stops.matched

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Text that is certain after this token; `may_stop` false passes stop strings through (min_tokens)."""
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        return self._stops.push(text) if may_stop else self._stops.flush() + text

    def flush(self) -> str:
        """The rest, when no more tokens come: none after a stop string; else an unfinished character becomes U+FFFD, as
        in one-shot decoding."""
        if self.matched_stop is not None:
            return ""
        return self._stops.flush() + self._utf8.decode(b"", final=True)


class SilentDetokenizer:
    """For models without a tokenizer: no text, no stop strings."""

    matched_stop: str | None = None

    def push(self, token_id: int, may_stop: bool = True) -> str:
        return ""

    def flush(self) -> str:
        return ""
