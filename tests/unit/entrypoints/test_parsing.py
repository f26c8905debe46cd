"""Reasoning and tool calls: the parts of an answer do not depend on how its text was cut into pieces."""

import json
import random

import pytest

from sarathi.entrypoints.parsing.answer_parser import AnswerParser
from sarathi.entrypoints.parsing.formats import FORMATS, detect_format
from sarathi.entrypoints.parsing.parts import Answer, ToolCall
from sarathi.entrypoints.parsing.reasoning import ReasoningParser
from sarathi.entrypoints.parsing.tool_parsers import HermesParser, LlamaParser, MistralParser
from sarathi.entrypoints.parsing.tools import read_tools
from sarathi.structured_outputs import StructuredOutputsParams, check_grammar

PARSERS = {"hermes": HermesParser, "mistral": MistralParser, "llama": LlamaParser}
CALL = '{"name": "f", "arguments": {"x": [1, {"y": "}\\""}], "z": "é</tool"}}'
ARGS = '{"x": [1, {"y": "}\\""}], "z": "é</tool"}'
CASES = [
    ("hermes", "Hello <b>you</b> < 3 \n", Answer("", "Hello <b>you</b> < 3 \n")),
    ("hermes", f"Sure. \n<tool_call>\n{CALL}\n</tool_call>", Answer("", "Sure.", [ToolCall("f", ARGS)])),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n",
     Answer("", "", [ToolCall("f", ARGS)] * 2)),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n so it is", Answer("", "so it is", [ToolCall("f", ARGS)])),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>',
     Answer("", "", [ToolCall("g", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', Answer("", "", [ToolCall("g", "{}")])),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>',
     Answer("", "", [ToolCall("g", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "g", "arguments": null, "id": 7}</tool_call>',
     Answer("", "", [ToolCall("g", "null")])),
    ("hermes", "a <tool_call> nothing here </tool_call> b", Answer("", "a nothing here b")),
    ("hermes", '<tool_call>{"tool": "g"}</tool_call>', Answer("", '{"tool": "g"}')),
    ("llama", '{"name": "f", "parameters": {"a": 1}}', Answer("", "", [ToolCall("f", '{"a": 1}')])),
    ("llama", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}; {"name": "g"}',
     Answer("", "", [ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")])),
    ("llama", "\n It is 5 {degrees}. ", Answer("", "\n It is 5 {degrees}. ")),
    ("llama", ' {"city": "Rome"} ', Answer("", ' {"city": "Rome"} ')),
    ("llama", "{}", Answer("", "{}")),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", Answer("", "", [ToolCall("f", ARGS)] * 2)),
    ("mistral", f"Well.[TOOL_CALLS] [{CALL}]", Answer("", "Well.", [ToolCall("f", ARGS)])),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": {"b": 1}}[TOOL_CALLS]g{}',
     Answer("", "", [ToolCall("f", '{"a": {"b": 1}}'), ToolCall("g", "{}")])),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]a1[ARGS]{"a": 1}', Answer("", "", [ToolCall("f", '{"a": 1}')])),
    ("mistral", "[TOOL] and [x] ", Answer("", "[TOOL] and [x] ")),
]  # fmt: skip


def pieces(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 12)))
    return [text[first:last] for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def parsed(parser: AnswerParser, texts: list[str], is_cut: bool = False) -> Answer:
    answer = Answer()
    for text in texts:
        answer.add(parser.push(text))
    answer.add(parser.push("", is_last=True, is_cut=is_cut))
    return answer


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
@pytest.mark.parametrize("thought", ["", "I <think> so.\n2 < 3"])
def test_any_cutting_gives_the_same_answer(
    rng: random.Random, name: str, text: str, expected: Answer, thought: str
) -> None:
    if thought:
        text = f"<think>\n{thought}\n</think>\n\n{text.lstrip()}"
        expected = Answer(thought, expected.content.lstrip(), expected.calls)
    for _ in range(30):
        reasoning = ReasoningParser() if thought or rng.random() < 0.5 else None
        parser = AnswerParser(reasoning, PARSERS[name]())
        assert parsed(parser, pieces(text, rng)) == expected
    assert AnswerParser(ReasoningParser(), PARSERS[name]()).whole(text, is_cut=False) == expected
    assert parsed(AnswerParser(ReasoningParser(), PARSERS[name]()), list(text)) == expected


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_a_cut_answer_leaks_no_markup_and_begins_as_the_whole_one(name: str, text: str, expected: Answer) -> None:
    marked = f"<think>why</think>{text}"
    for length in range(len(marked)):
        answer = AnswerParser(ReasoningParser(), PARSERS[name]()).whole(marked[:length], is_cut=True)
        assert expected.content.lstrip().startswith(answer.content.strip()), (marked[:length], answer)
        assert "why".startswith(answer.reasoning)
        for found, whole in zip(answer.calls, expected.calls, strict=False):
            assert found.name == whole.name and whole.arguments.startswith(found.arguments)
        assert len(answer.calls) <= len(expected.calls)
        if expected.calls:
            assert not any(mark in answer.content for mark in ("<tool", "[TOOL", "{", "name", "<|p"))


def test_arguments_come_while_they_are_written() -> None:
    parser = AnswerParser(None, HermesParser())
    begun = parser.push('<tool_call>{"name": "f", "arguments": {"long": "aaa')
    assert [tuple(part) for part in begun] == [(0, "f"), (0, '{"long": "aaa')]
    assert [tuple(part) for part in parser.push("bbb")] == [(0, "bbb")]


def test_reasoning_that_the_prompt_has_opened() -> None:
    parser = AnswerParser(ReasoningParser(is_open=True), HermesParser())
    assert parser.whole("\nHm. \n</think>\n\nYes.", is_cut=False) == Answer("Hm.", "Yes.")
    parser = AnswerParser(ReasoningParser(is_open=True))
    assert parser.whole("Hm. </th", is_cut=True) == Answer("Hm.", "")


@pytest.mark.parametrize("name", PARSERS)
def test_random_text_never_raises_and_does_not_depend_on_its_cutting(rng: random.Random, name: str) -> None:
    words = [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "</think>", "{", "}", "[", "]", '"',
        '"name"', ":", '"f"', '"arguments"', ",", ";", " ", "\n", "\\", "é", "x", '{"name": "f", "arguments": {',
        "\\ud800",
    ]  # fmt: skip
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randint(0, 14)))
        is_cut = rng.random() < 0.5
        answers = [
            parsed(AnswerParser(ReasoningParser(), PARSERS[name]()), cut, is_cut)
            for cut in (pieces(text, rng), list(text), [text])
        ]
        assert answers[0] == answers[1] == answers[2], text
        for call in answers[0].calls:
            json.dumps(call.name).encode()
            call.arguments.encode()


@pytest.mark.parametrize("name", FORMATS)
def test_calls_as_a_format_writes_them_are_read_and_its_grammar_is_valid(rng: random.Random, name: str) -> None:
    style = FORMATS[name]
    calls = [("f", '{"x": "}"}'), ("g-1", "{}"), ("f", '{"x": "[TOOL_CALLS]"}')]
    text = style.write(calls)
    for _ in range(10):
        answer = parsed(AnswerParser(None, style.make_parser()), pieces(text, rng))
        assert answer == Answer("", "", [ToolCall(*call) for call in calls])
    tools = read_tools([{"type": "function", "function": {"name": each}} for each in ("f", "g-1")])
    for most in (1, 8):
        assert check_grammar(StructuredOutputsParams(grammar=style.grammar(tools, most))) is None


def test_a_template_shows_the_format_of_its_calls() -> None:
    assert detect_format("...[TOOL_CALLS]...").name == "mistral"
    assert detect_format("{{ '<|python_tag|>' }}").name == "llama3_json"
    assert detect_format("<tool_call>").name == detect_format("").name == "hermes"
