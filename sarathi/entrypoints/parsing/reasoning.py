"""Reasoning before an answer: `<think>...</think>`, as Qwen3 and other models write it."""

from sarathi.entrypoints.parsing.markup import TextUntil
from sarathi.entrypoints.parsing.parts import Part, Reasoning, Text

BEGIN, END = "<think>", "</think>"


class ReasoningParser:
    """Emits Reasoning parts, then Text parts, without the whitespace around the reasoning.

    is_open: the prompt already contains the opening tag.
    """

    def __init__(self, is_open: bool = False) -> None:
        self._lead = ""
        self._until = TextUntil(END)
        self._state = self._reasoning if is_open else self._opening
        self._is_gap = is_open

    def push(self, text: str) -> list[Part]:
        return self._state(text) if text else []

    def flush(self, is_cut: bool) -> list[Part]:
        if self._state == self._opening:
            is_partial = is_cut and self._lead.strip()
            return [] if is_partial else [Text(self._lead)]
        if self._state == self._reasoning:
            return [Reasoning(self._until.flush(is_cut).rstrip())]
        return []

    def _opening(self, text: str) -> list[Part]:
        self._lead += text
        seen = self._lead.lstrip()
        if seen.startswith(BEGIN):
            self._state, self._is_gap = self._reasoning, True
            return self.push(seen.removeprefix(BEGIN))
        if BEGIN.startswith(seen):
            return []
        self._state, self._is_gap = self._content, False
        return self.push(self._lead)

    def _reasoning(self, text: str) -> list[Part]:
        released, rest = self._until.push(self._without_gap(text))
        parts: list[Part] = [Reasoning(released)]
        if rest is not None:
            self._state, self._is_gap = self._content, True
            parts += self.push(rest)
        return parts

    def _content(self, text: str) -> list[Part]:
        return [Text(self._without_gap(text))]

    def _without_gap(self, text: str) -> str:
        text = text.lstrip() if self._is_gap else text
        self._is_gap &= not text
        return text
