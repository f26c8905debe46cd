"""Items of the Responses API as messages for a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from sarathi.wording import short_repr

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = ("input_text", "output_text", "text")


def to_messages(items: Sequence[Mapping[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation. Merges instructions with leading system messages, and consecutive calls into one assistant
    message; drops reasoning. ValueError for an item that is not supported."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for number, item in enumerate(items):
        _add(messages, item, f"input[{number}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(messages, _role(item, where), _text(item.get("content"), where))
    elif kind == "function_call":
        _add_call(messages, item)
    elif kind == "function_call_output":
        output = _text(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind != "reasoning":
        raise ValueError(
            f"{where}.type is {short_repr(kind)}: it must be message, function_call, function_call_output or reasoning"
        )


def _add_message(messages: list[dict[str, Any]], role: str, text: str) -> None:
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n\n{text}"
    else:
        messages.append({"role": role, "content": text})


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _role(item: Mapping[str, Any], where: str) -> str:
    role = item.get("role")
    if role not in _ROLES:
        raise ValueError(f"{where}.role is {short_repr(role)}: it must be one of {', '.join(_ROLES)}")
    return _ROLES[role]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"{where} has the content {short_repr(content)}: it must be text or a list of parts")
    for part in content:
        if part.get("type") not in _TEXTS:
            raise ValueError(f"{where} has a part of type {short_repr(part.get('type'))}: this model takes text")
    return "\n".join(str(part.get("text", "")) for part in content)
