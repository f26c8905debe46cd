"""Parsed answers as messages of chat completions, whole and in deltas."""

from msgspec import UNSET

from sarathi.engine.outputs import CompletionOutput
from sarathi.entrypoints.openai.objects import CalledFunction, Delta, Message, ToolCall, ToolCallDelta
from sarathi.entrypoints.parsing.answer_parser import AnswerParser
from sarathi.entrypoints.parsing.parts import Answer, CallBegin, Part, Reasoning, Text
from sarathi.entrypoints.parsing.turn import ModelFormat


def whole_message(answer: Answer, model_format: ModelFormat) -> Message:
    """Content is null if there are calls and no text."""
    make_id = model_format.tools.make_id
    calls = [ToolCall(make_id(), CalledFunction(call.name, call.arguments)) for call in answer.calls]
    content = answer.content if answer.content or not calls else None
    return Message(content, reasoning_content=answer.reasoning or UNSET, tool_calls=calls or UNSET)


class AnswerStream:
    """The deltas of one message."""

    def __init__(self, parser: AnswerParser, model_format: ModelFormat) -> None:
        self._parser = parser
        self._make_id = model_format.tools.make_id
        self._has_calls = False

    def delta(self, output: CompletionOutput) -> Delta:
        """The delta of the latest output; empty content if it adds nothing yet."""
        parts = self._parser.push(output.delta, output.finished, is_cut=output.finish_reason != "stop")
        delta = Delta()
        for part in parts:
            self._add(delta, part)
        if not parts:
            delta.content = ""
        return delta

    def finish_reason(self, output: CompletionOutput) -> str | None:
        """tool_calls if the message has a call and was not cut off."""
        return "tool_calls" if self._has_calls and output.finish_reason == "stop" else output.finish_reason

    def _add(self, delta: Delta, part: Part) -> None:
        if isinstance(part, Text):
            delta.content = (delta.content or "") + part.text
        elif isinstance(part, Reasoning):
            delta.reasoning_content = (delta.reasoning_content or "") + part.text
        else:
            delta.tool_calls = delta.tool_calls or []
            if isinstance(part, CallBegin):
                self._has_calls = True
                function = CalledFunction(part.name, "")
                delta.tool_calls.append(ToolCallDelta(part.call, function, self._make_id(), "function"))
            elif delta.tool_calls and delta.tool_calls[-1].index == part.call:
                last = delta.tool_calls[-1].function
                last.arguments = (last.arguments or "") + part.text
            else:
                delta.tool_calls.append(ToolCallDelta(part.call, CalledFunction(arguments=part.text)))
