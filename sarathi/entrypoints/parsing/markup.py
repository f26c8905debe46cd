"""Text up to a tag, when both come in pieces."""


class TextUntil:
    """Releases the text before a tag, without the whitespace that stands directly before the tag."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain, and what follows the tag; None while there is no tag."""
        held = self._held + text
        before, tag, rest = held.partition(self._tag)
        if tag:
            self._held = ""
            return before.rstrip(), rest
        end = len(held[: len(held) - self._partial_tag(held)].rstrip())
        self._held = held[end:]
        return held[:end], None

    def flush(self, is_cut: bool) -> str:
        """What is held; where the answer was cut, without what could have become the tag."""
        held, self._held = self._held, ""
        return held[: len(held) - self._partial_tag(held)].rstrip() if is_cut else held

    def _partial_tag(self, text: str) -> int:
        """Length of the longest tail that begins the tag."""
        longest = min(len(text), len(self._tag) - 1)
        return next((length for length in range(longest, 0, -1) if text.endswith(self._tag[:length])), 0)
