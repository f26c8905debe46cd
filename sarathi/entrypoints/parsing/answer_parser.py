"""Splits the text of one answer into parts: reasoning first, then content and tool calls."""

from sarathi.entrypoints.parsing.parts import Answer, Part, Text, ToolParser, joined
from sarathi.entrypoints.parsing.reasoning import ReasoningParser


class AnswerParser:
    """Parser of one answer. None: no reasoning or no tool calls are expected, and such text is content."""

    def __init__(self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None) -> None:
        self._reasoning, self._tools = reasoning, tools

    def push(self, text: str, is_last: bool = False, is_cut: bool = False) -> list[Part]:
        """The parts that this text completes; with the last text, all that remain.

        is_cut: the answer was cut off, for example by max_tokens.
        """
        parts: list[Part] = [Text(text)] if self._reasoning is None else self._reasoning.push(text)
        if is_last and self._reasoning is not None:
            parts += self._reasoning.flush(is_cut)
        if self._tools is not None:
            parts = [each for part in parts for each in self._with_calls(part, self._tools)]
            parts += self._tools.flush(is_cut) if is_last else []
        return joined(parts)

    def whole(self, text: str, is_cut: bool) -> Answer:
        """Parse a complete answer."""
        answer = Answer()
        answer.add(self.push(text, is_last=True, is_cut=is_cut))
        return answer

    @staticmethod
    def _with_calls(part: Part, tools: ToolParser) -> list[Part]:
        return tools.push(part.text) if isinstance(part, Text) else [part]
