"""Request bodies of the Messages API, and their translation for the chat template."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from sarathi.entrypoints.openai.protocol import Body, Messages
from sarathi.entrypoints.parsing.tools import ToolChoice, read_choice, read_tool
from sarathi.entrypoints.parsing.turn import ModelFormat, Turn
from sarathi.sampling_params import SamplingParams
from sarathi.wording import short_repr

Blocks = str | list[dict[str, Any]]


class CountRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: Messages
    system: Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None

    def turn(self, model_format: ModelFormat) -> Turn:
        """The conversation with its tools. Raises ValueError."""
        tools = [_tool(tool, number) for number, tool in enumerate(self.tools or ())]
        choice = self.tool_choice or {}
        messages = [each for at, message in enumerate(self.messages) for each in _messages(message, at)]
        if self.system:
            messages.insert(0, {"role": "system", "content": _text(self.system, "system")})
        one_call = choice.get("disable_parallel_tool_use") is True
        return Turn(model_format, messages, tools, _choice(choice, tools), one_call)

    def template_options(self, model_format: ModelFormat) -> dict[str, Any]:
        """Continue a final assistant message; enable reasoning if the request does."""
        is_open = self.messages[-1].get("role") == "assistant"
        options: dict[str, Any] = {"add_generation_prompt": not is_open, "continue_final_message": is_open}
        if model_format.thinks:
            thinks = (self.thinking or {}).get("type") in ("enabled", "adaptive")
            options["chat_template_kwargs"] = {"enable_thinking": thinks}
        return options


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def sampling_params(self) -> SamplingParams:
        """ValueError where a value is not allowed."""
        given: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "stop": self.stop_sequences,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=self.max_tokens, **given)


def _tool(tool: Mapping[str, Any], number: int) -> Any:
    if tool.get("type", "custom") != "custom":
        raise ValueError(f"tools[{number}].type is {short_repr(tool['type'])}: this server has tools of type custom")
    return read_tool({**tool, "parameters": tool.get("input_schema")}, f"tools[{number}]")


def _choice(choice: Mapping[str, Any], tools: Sequence[Any]) -> ToolChoice:
    kind = choice.get("type")
    if kind == "tool":
        return read_choice({"name": choice.get("name")}, tools)
    modes = {None: None, "auto": "auto", "any": "required", "none": "none"}
    if kind not in modes:
        raise ValueError(f"tool_choice.type is {short_repr(kind)}: it must be auto, any, tool or none")
    return read_choice(modes[kind], tools)


def _messages(message: Mapping[str, Any], at: int) -> Iterator[dict[str, Any]]:
    """Messages for chat templates, where tool results are separate messages."""
    role, content, where = message.get("role"), message.get("content"), f"messages[{at}]"
    if role not in ("user", "assistant", "system"):
        raise ValueError(f"{where}.role is {short_repr(role)}: it must be user or assistant")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    blocks = _blocks(content, f"{where}.content")
    for block in blocks:
        if block.get("type") == "tool_result":
            result = _text(block.get("content") or "", f"{where}.content")
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result}
    calls = [_call(block) for block in blocks if block.get("type") == "tool_use"]
    others = [block for block in blocks if block.get("type") not in ("tool_use", "tool_result")]
    text = _text(others, f"{where}.content")
    if calls:
        yield {"role": role, "content": text, "tool_calls": calls}
    elif others or not blocks:
        yield {"role": role, "content": text}


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False)}
    return {"id": block.get("id"), "type": "function", "function": function}


def _text(content: Any, where: str) -> str:
    """The text of the blocks, without earlier thinking."""
    if isinstance(content, str):
        return content
    texts = []
    for block in _blocks(content, where):
        if block.get("type") == "text":
            texts.append(str(block.get("text", "")))
        elif block.get("type") not in ("thinking", "redacted_thinking"):
            raise ValueError(f"{where} has a block of type {short_repr(block.get('type'))}: this model takes text")
    return "\n".join(texts)


def _blocks(content: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise ValueError(f"{where} is {short_repr(content)}: it must be text or a list of content blocks")
    return content
