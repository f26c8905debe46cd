"""Tools in the system message, for models whose chat template does not support tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sarathi.entrypoints.parsing.formats import ToolFormat
from sarathi.entrypoints.parsing.tools import Tool

_INTRODUCTION = "You can call functions. Each line below describes one of them as JSON:"


def describe_tools(messages: Sequence[Any], tools: Sequence[Tool], style: ToolFormat) -> list[Any]:
    """The conversation with tools in the system message, and calls and results as text."""
    plain = [_plain(message, style) for message in messages]
    if not tools:
        return plain
    example = style.write([("NAME", '{"PARAMETER": VALUE}')])
    lines = [json.dumps(tool.as_openai()["function"], ensure_ascii=False) for tool in tools]
    text = "\n".join([_INTRODUCTION, *lines, "To call a function, answer with its name and arguments:", example])
    if plain and isinstance(plain[0], Mapping) and plain[0].get("role") == "system":
        return [{**plain[0], "content": f"{_text(plain[0].get('content'))}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: Any, style: ToolFormat) -> Any:
    if not isinstance(message, Mapping):
        return message
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("function"), Mapping) for call in calls):
        return message
    written = style.write([(call["function"].get("name", ""), _arguments(call["function"])) for call in calls])
    content = _text(message.get("content"))
    return {"role": message["role"], "content": f"{content}\n{written}" if content else written}


def _arguments(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or {}
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _text(content: Any) -> str:
    """Text, or the text of parts; other content is returned unchanged and refused later."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)
