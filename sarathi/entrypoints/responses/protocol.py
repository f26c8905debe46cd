"""Request bodies of the Responses API."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from sarathi.entrypoints.openai.protocol import Body, read_response_format
from sarathi.entrypoints.parsing.tools import Tool, ToolChoice, read_choice, read_tool
from sarathi.entrypoints.parsing.turn import ModelFormat, Turn
from sarathi.entrypoints.responses.items import to_messages
from sarathi.sampling_params import SamplingParams
from sarathi.structured_outputs import StructuredOutputsParams
from sarathi.wording import short_repr

Items = list[dict[str, Any]]


class ResponsesRequest(Body):
    """POST /v1/responses. background: respond at once and generate afterwards; clients poll for the result."""

    model: str
    input: str | Items
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Items | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_logprobs: int | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    truncation: str | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None

    @model_validator(mode="after")
    def _check_refused(self) -> "ResponsesRequest":
        if self.top_logprobs:
            raise ValueError(
                f"top_logprobs is {self.top_logprobs}: it must be 0; chat completions have log probabilities"
            )
        if self.truncation not in (None, "disabled"):
            raise ValueError(
                f"truncation is {self.truncation!r}: it must be disabled, this server truncates no conversation"
            )
        for name in ("conversation", "prompt"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is given: this server keeps none; it has previous_response_id")
        if self.background and (self.stream or self.store is False):
            raise ValueError("background is true: it needs stream=false and store=true")
        return self

    @property
    def input_items(self) -> Items:
        """The input as items; a string is a user message."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def functions(self) -> list[Tool]:
        """The tools. Raises ValueError."""
        found = []
        for number, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                raise ValueError(
                    f"tools[{number}].type is {short_repr(tool.get('type'))}: this server has tools of type function"
                )
            found.append(read_tool(tool, f"tools[{number}]"))
        return found

    def turn(self, model_format: ModelFormat, items: Sequence[Mapping[str, Any]]) -> Turn:
        """The conversation. items: all of them, including the input. Raises ValueError."""
        tools = self.functions()
        choice, tools = _choice(self.tool_choice, tools)
        one_call = self.parallel_tool_calls is False or self.max_tool_calls == 1
        return Turn(model_format, to_messages(items, self.instructions), tools, choice, one_call, self._limit())

    def template_options(self, model_format: ModelFormat) -> dict[str, Any]:
        """Enable reasoning unless the effort is none."""
        if model_format.thinks and (self.reasoning or {}).get("effort") == "none":
            return {"chat_template_kwargs": {"enable_thinking": False}}
        return {}

    def sampling_params(self) -> SamplingParams:
        """ValueError where a value is not allowed."""
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "cache_salt")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SamplingParams(max_tokens=self.max_output_tokens, **given)

    def _limit(self) -> StructuredOutputsParams | None:
        wanted = (self.text or {}).get("format")
        if not isinstance(wanted, (Mapping, type(None))):
            raise ValueError(f"text.format is {short_repr(wanted)}: it must be an object with a type")
        return StructuredOutputsParams.of(read_response_format(wanted))


def _choice(choice: Any, tools: list[Tool]) -> tuple[ToolChoice, list[Tool]]:
    """The choice, and the tools that it allows."""
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return read_choice(choice, tools), tools
    names = [each.get("name") for each in choice.get("tools") or () if isinstance(each, Mapping)]
    for name in names:
        read_choice({"name": name}, tools)  # it must be one of the tools
    allowed = [tool for tool in tools if tool.name in names]
    return read_choice(choice.get("mode", "auto"), allowed), allowed
