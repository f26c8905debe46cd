"""Tool call formats of the model families: parsers, and grammars that force a call."""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sarathi.entrypoints.parsing.parts import ToolParser
from sarathi.entrypoints.parsing.tool_parsers import HermesParser, LlamaParser, MistralParser
from sarathi.entrypoints.parsing.tools import Tool

_MAX_CALLS = 8  # in one answer, by the grammar


@dataclass(frozen=True)
class ToolFormat:
    """begin, between and end: markup around the calls. open and close: markup around each call.

    arguments: name of the JSON member with the arguments. special: the tag that is a special token of the family, which
    detokenization must therefore keep. id_length: of call ids that the templates accept.
    """

    name: str
    make_parser: Callable[[], ToolParser]
    begin: str = ""
    open: str = ""
    close: str = ""
    between: str = "\n"
    end: str = ""
    arguments: str = "arguments"
    special: str | None = None
    id_length: int | None = None

    def make_id(self) -> str:
        """An id for a new call."""
        number = uuid.uuid4().hex
        return f"call_{number[:24]}" if self.id_length is None else number[: self.id_length]

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Format calls as the model writes them. calls: (name, arguments as JSON)."""
        shown = [
            f'{self.open}{{"name": {json.dumps(name)}, "{self.arguments}": {arguments}}}{self.close}'
            for name, arguments in calls
        ]
        return self.begin + self.between.join(shown) + self.end

    def grammar(self, tools: Sequence[Tool], most_calls: int = _MAX_CALLS, special_id: int | None = None) -> str:
        """A Lark grammar of one or more calls of these tools. special_id: token id of `special`, if any."""
        begin = _quoted(self.begin)
        if special_id is not None and self.special is not None:
            rest = self.begin.removeprefix(self.special)
            begin = f"<[{special_id}]>" + (f" {_quoted(rest)}" if rest else "")
        more = f" ({_quoted(self.between)} call){{0,{most_calls - 1}}}" if most_calls > 1 else ""
        rules = [f"start: {begin} call{more} {_quoted(self.end)}"]
        named = " | ".join(f"call_{number}" for number in range(len(tools)))
        rules.append(f"call: {_quoted(self.open)} ({named}) {_quoted('}' + self.close)}")
        for number, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool.name)}, "{self.arguments}": '
            rules.append(f"call_{number}: {_quoted(head)} arguments_{number}")
            rules.append(f"arguments_{number}: %json {tool.arguments_schema()}")
        return "\n".join(rules)


HERMES = ToolFormat("hermes", HermesParser, open="<tool_call>\n", close="\n</tool_call>")
MISTRAL = ToolFormat(
    "mistral", MistralParser, begin="[TOOL_CALLS][", between=", ", end="]", special="[TOOL_CALLS]", id_length=9
)
LLAMA = ToolFormat("llama3_json", LlamaParser, between="; ", arguments="parameters", special="<|python_tag|>")
FORMATS = {each.name: each for each in (HERMES, MISTRAL, LLAMA)}


def detect_format(chat_template: str) -> ToolFormat:
    """The format used in a chat template; Hermes if none is recognized."""
    if "[TOOL_CALLS]" in chat_template:
        return MISTRAL
    if "<tool_call>" not in chat_template and ("<|python_tag|>" in chat_template or "ipython" in chat_template):
        return LLAMA
    return HERMES


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
