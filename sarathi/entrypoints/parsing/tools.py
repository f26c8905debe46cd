"""Tools of a request, and the tool choice."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sarathi.structured_outputs import JSON_WHITESPACE
from sarathi.wording import short_repr

_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")
_NONE: Mapping[str, Any] = {"type": "object", "properties": {}}  # a function without parameters


@dataclass(frozen=True)
class Tool:
    """A function. parameters: JSON schema of its arguments. is_strict: enforce the whole schema; otherwise keywords
    that llguidance does not support are dropped."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    is_strict: bool = False

    def as_openai(self) -> dict[str, Any]:
        """In the form that chat templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def arguments_schema(self) -> str:
        """The schema for the grammar: without undeclared members, with little whitespace."""
        schema = dict(self.parameters)
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        guidance = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not self.is_strict}
        return json.dumps({**schema, "x-guidance": guidance}, ensure_ascii=False)


@dataclass(frozen=True)
class ToolChoice:
    """mode: auto (the model decides), none, required (at least one call). name: with required, the tool to call."""

    mode: str = "auto"
    name: str | None = None


NO_TOOLS = ToolChoice("none")


def read_tool(function: object, where: str) -> Tool:
    """Parse a mapping with name, description and parameters. ValueErrors name the field."""
    if not isinstance(function, Mapping):
        raise ValueError(f"{where} is {short_repr(function)}: it must be an object with name and parameters")
    name, description = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}.name is {short_repr(name)}: it must be 1 to 128 letters, digits or characters of _ . : / -"
        )
    parameters = function.get("parameters")
    if not isinstance(parameters, (Mapping, type(None))):
        raise ValueError(f"{where}.parameters is {short_repr(parameters)}: it must be a JSON schema, an object")
    return Tool(name, str(description), parameters or _NONE, function.get("strict") is True)


def read_tools(tools: Sequence[Any] | None) -> list[Tool]:
    """Parse the tools of OpenAI's chat completions."""
    found = []
    for number, tool in enumerate(tools or ()):
        where = f"tools[{number}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise ValueError(f"{where}.type is {short_repr(kind)}: this server has tools of type function")
        found.append(read_tool(tool.get("function"), f"{where}.function"))
    return found


def read_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """Parse OpenAI's tool_choice: a mode, or a function. ValueError if it does not match the tools."""
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in {tool.name for tool in tools}:
            raise ValueError(f"tool_choice names {short_repr(name)}: tools has {[tool.name for tool in tools]}")
        return ToolChoice("required", name)
    if choice not in ("auto", "none", "required"):
        raise ValueError(f"tool_choice is {short_repr(choice)}: it must be auto, none, required or name a function")
    if choice == "required" and not tools:
        raise ValueError("tool_choice is 'required': it needs tools")
    return ToolChoice(choice)
