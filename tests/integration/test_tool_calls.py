"""Structured output, tool calls and reasoning over a real server with SmolLM2, through OpenAI's client."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from http_server import RunningServer

MODEL = "smollm2-135m"
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
SMALL = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": ASK, "max_tokens": 200, **fields})


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_a_call_that_must_be_made_is_made_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    fields = {"tools": [CLOCK, WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "temperature": 0.0}
    [whole] = chat(client, **fields).choices
    [call] = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None and call.id and call.type == "function"
    if choice != "required":
        assert call.function.name == "get_weather"
    schema = CITY if call.function.name == "get_weather" else {"type": "object"}
    jsonschema.validate(json.loads(call.function.arguments), schema)

    chunks = [chunk.choices[0] for chunk in chat(client, **fields, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    assert [delta.id is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert {delta.index for delta in deltas} == {0} and deltas[0].function.name == call.function.name
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert not "".join(chunk.delta.content or "" for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls" and chunks[0].delta.role == "assistant"


def test_a_call_that_max_tokens_cuts_leaks_no_markup(client: openai.OpenAI) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "temperature": 0.0}

    def whole(most: int) -> Any:
        return chat(client, **fields, max_tokens=most).choices[0]

    def streamed(most: int) -> list[Any]:
        return [chunk.choices[0] for chunk in chat(client, **fields, max_tokens=most, stream=True)]

    limits = range(1, 24, 3)
    with ThreadPoolExecutor(16) as pool:
        cuts, streams = pool.map(whole, limits), pool.map(streamed, limits)
    for cut, chunks in zip(cuts, streams, strict=True):
        assert cut.finish_reason == chunks[-1].finish_reason == "length"
        assert not cut.message.content and not "".join(chunk.delta.content or "" for chunk in chunks)


def test_a_call_and_its_result_are_part_of_a_conversation(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 31 degrees"},
    ]
    done = chat(client, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=12)
    with_tools = chat(client, messages=messages, tools=[WEATHER], max_tokens=12)
    assert with_tools.usage.prompt_tokens > done.usage.prompt_tokens > 40


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_object"}, "max_tokens": 30}, lambda text: text.lstrip()[0] == "{"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SMALL}}},
            lambda text: jsonschema.validate(json.loads(text), SMALL) is None,
        ),
        ({"extra_body": {"guided_json": SMALL}}, lambda text: jsonschema.validate(json.loads(text), SMALL) is None),
        ({"extra_body": {"guided_regex": "[a-c]{3}"}}, lambda text: re.fullmatch("[a-c]{3}", text)),
        ({"extra_body": {"guided_choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
        ({"extra_body": {"guided_grammar": 'root ::= "x" "y"'}}, lambda text: text == "xy"),
        ({"extra_body": {"structured_outputs": {"regex": "z{4}"}}}, lambda text: text == "zzzz"),
    ],
)  # fmt: skip
def test_every_way_to_ask_for_structure_works_in_chat_and_completions(
    client: openai.OpenAI, fields: dict[str, Any], check: Any
) -> None:
    assert check(chat(client, **fields).choices[0].message.content)
    plain = {
        "extra_body": {**fields.get("extra_body", {}), **{k: v for k, v in fields.items() if k == "response_format"}}
    }
    text = client.completions.create(model=MODEL, prompt="Here:", max_tokens=fields.get("max_tokens", 60), **plain)
    assert check(text.choices[0].text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ({"extra_body": {"guided_regex": "(a"}}, "unclosed group"),
        ({"extra_body": {"guided_json": {"type": "frob"}}}, "Invalid type"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["a"]}}, "only one may say"),
        ({"tool_choice": "required"}, "tool_choice is 'required': it needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice names"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\].function.name is 'a b'"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type is 'web_search'"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice requires a call",
        ),
    ],
)
def test_what_does_not_fit_is_a_400_that_names_it(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **fields)
