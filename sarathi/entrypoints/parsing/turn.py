"""One turn of a conversation: its prompt, its grammar, and the parser of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.entrypoints.parsing.answer_parser import AnswerParser
from sarathi.entrypoints.parsing.described_tools import describe_tools
from sarathi.entrypoints.parsing.formats import FORMATS, ToolFormat, detect_format
from sarathi.entrypoints.parsing.reasoning import BEGIN, END, ReasoningParser
from sarathi.entrypoints.parsing.tools import NO_TOOLS, Tool, ToolChoice
from sarathi.sampling_params import SamplingParams
from sarathi.structured_outputs import StructuredOutputsParams

AUTO = "auto"
_TAIL_TOKENS = 8  # at the end of a prompt, searched for the opening tag of the reasoning


@dataclass(frozen=True)
class ModelFormat:
    """Tool call and reasoning formats of a model.

    takes_tools: whether its chat template supports tools. special_id: token id of the format's special tag.
    """

    tools: ToolFormat
    thinks: bool
    takes_tools: bool
    special_id: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, tool_parser: str = AUTO, reasoning_parser: str = AUTO) -> "ModelFormat":
        """The formats by parser name; auto: detected from the chat template."""
        template = "" if tokenizer is None else tokenizer.chat_template or ""
        style = detect_format(template) if tool_parser == AUTO else FORMATS[tool_parser]
        thinks = END in template if reasoning_parser == AUTO else reasoning_parser != "none"
        special_id = None if tokenizer is None or style.special is None else tokenizer.special_id(style.special)
        return cls(style, thinks, "tools" in template, special_id)


@dataclass(frozen=True)
class Turn:
    """A conversation to continue.

    one_call: whether at most one tool may be called. limit: structure of the answer, apart from calls.

    Raises ValueError if limit and tool choice are incompatible.
    """

    format: ModelFormat
    messages: Sequence[Any]
    tools: Sequence[Tool] = ()
    choice: ToolChoice = NO_TOOLS
    one_call: bool = False
    limit: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.choice.mode == "required":
            raise ValueError("tool_choice requires a call: it cannot be combined with another output structure")

    def template_arguments(self) -> dict[str, Any]:
        """Messages and tools as arguments of `encode_chat`."""
        if self.format.takes_tools:
            tools = [tool.as_openai() for tool in self.tools] if self.choice.mode != "none" else []
            return {"conversation": self.messages, "tools": tools or None}
        shown = self.tools if self.choice.mode != "none" else ()
        return {"conversation": describe_tools(self.messages, shown, self.format.tools), "tools": None}

    def limited(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the grammar of a required call, and with the special tags of calls kept."""
        if self.choice.mode == "required":
            wanted = [tool for tool in self.tools if self.choice.name in (None, tool.name)]
            most = 1 if self.one_call or self.choice.name is not None else 8
            grammar = self.format.tools.grammar(wanted, most, self.format.special_id)
            params = replace(params, structured_outputs=StructuredOutputsParams(grammar=grammar))
        elif self.limit is not None:
            params = replace(params, structured_outputs=self.limit)
        if self._looks_for_calls and self.format.special_id is not None:
            params = replace(params, skip_special_tokens=False)
        return params

    def parser(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> AnswerParser:
        """The parser of one answer to this prompt."""
        reasoning = None
        if self.format.thinks and self.limit is None and self.choice.mode != "required":
            tail = tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False)
            reasoning = ReasoningParser(is_open=tail.rstrip().endswith(BEGIN))
        return AnswerParser(reasoning, self.format.tools.make_parser() if self._looks_for_calls else None)

    @property
    def _looks_for_calls(self) -> bool:
        return bool(self.tools) and self.choice.mode != "none" and self.limit is None
