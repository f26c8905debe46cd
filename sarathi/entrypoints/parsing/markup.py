"""Incremental search for a tag in streamed text."""


class TextUntil:
    """Returns the text before a tag, without the whitespace just before the tag."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text known to precede the tag, and the text after the tag; None before the tag is found."""
        held = self._held + text
        before, tag, rest = held.partition(self._tag)
        if tag:
            self._held = ""
            return before.rstrip(), rest
        end = len(held[: len(held) - self._partial_tag(held)].rstrip())
        self._held = held[end:]
        return held[:end], None

    def flush(self, is_cut: bool) -> str:
        """The rest of the text; if the answer was cut off, without a partial tag at its end."""
        held, self._held = self._held, ""
        return held[: len(held) - self._partial_tag(held)].rstrip() if is_cut else held

    def _partial_tag(self, text: str) -> int:
        """Length of the longest suffix that is a prefix of the tag."""
        longest = min(len(text), len(self._tag) - 1)
        return next((length for length in range(longest, 0, -1) if text.endswith(self._tag[:length])), 0)
