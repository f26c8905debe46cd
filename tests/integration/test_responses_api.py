"""OpenAI's Responses API over a real server with SmolLM2, through OpenAI's own client."""

import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from http_server import RunningServer

from sarathi.entrypoints.responses.store import ResponseStore, StoredResponse
from sarathi.entrypoints.server.errors import APIError

MODEL = "smollm2-135m"
ASK = "What is the capital of France?"
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "Weather", "parameters": CITY, "strict": None}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(**{"model": MODEL, "input": ASK, "temperature": 0.0, **fields})


def test_a_response_whole_streamed_and_retrieved(client: openai.OpenAI) -> None:
    whole = create(client, metadata={"a": "b"})
    assert whole.output_text == "The capital of France is Paris." and whole.status == "completed"
    assert client.responses.retrieve(whole.id) == whole
    events = list(create(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == whole.output_text and len(deltas) > 3
    usage = events[-1].response.usage
    assert usage.total_tokens == whole.usage.total_tokens and usage.output_tokens == whole.usage.output_tokens > 3
    client.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(whole.id)


def test_a_conversation_goes_on_from_a_response_and_keeps_calls(client: openai.OpenAI) -> None:
    first = create(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    [call] = first.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    jsonschema.validate(json.loads(call.arguments), CITY)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = create(client, previous_response_id=first.id, input=[result], tools=[WEATHER], max_output_tokens=3)
    assert second.usage.input_tokens > first.usage.input_tokens + 20
    assert (second.status, second.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    explicit = [{"role": "user", "content": ASK}, call.model_dump(), result]
    same = create(client, input=explicit, tools=[WEATHER], max_output_tokens=3)
    assert same.usage.input_tokens == second.usage.input_tokens and same.output_text == second.output_text
    assert [item.type for item in client.responses.input_items.list(second.id).data] == ["function_call_output"]


def test_the_events_of_a_call(client: openai.OpenAI) -> None:
    events = list(create(client, tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"}, stream=True))
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    [call] = events[-1].response.output
    assert "".join(event.delta for event in deltas) == done.arguments == call.arguments
    assert {event.item_id for event in deltas} == {call.id} and not events[-1].response.output_text


def test_instructions_are_not_kept_and_input_takes_every_form(client: openai.OpenAI) -> None:
    plain = create(client, max_output_tokens=1)
    ruled = create(client, instructions="Answer in French.", max_output_tokens=1)
    parts = [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]
    system = [{"role": "developer", "content": "Answer in French."}, *parts]
    assert create(client, input=parts, max_output_tokens=1).usage.input_tokens == plain.usage.input_tokens
    assert create(client, input=system, max_output_tokens=1).usage.input_tokens == ruled.usage.input_tokens
    after = create(client, previous_response_id=ruled.id, input="Why?", max_output_tokens=1)
    again = create(client, previous_response_id=plain.id, input="Why?", max_output_tokens=1)
    assert after.usage.input_tokens == again.usage.input_tokens


def test_text_of_a_format(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "name": "city", "schema": {**CITY, "additionalProperties": False}, "strict": True}
    jsonschema.validate(json.loads(create(client, text={"format": wanted}).output_text), CITY)


def test_a_response_in_the_background_is_polled_and_cancelled(client: openai.OpenAI) -> None:
    done = create(client, background=True)
    while done.status == "in_progress":
        time.sleep(0.1)
        done = client.responses.retrieve(done.id)
    assert done.output_text == "The capital of France is Paris."
    tale = client.responses.create(model=MODEL, input="Tell me a long tale.", background=True)
    assert tale.status == "in_progress"
    assert client.responses.cancel(tale.id).status == client.responses.retrieve(tale.id).status == "cancelled"
    assert client.responses.cancel(done.id).status == "completed"
    with pytest.raises(openai.BadRequestError, match="not a background response"):
        client.responses.cancel(create(client, max_output_tokens=1).id)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_none"}, "Previous response with id 'resp_none' not found"),
        ({"input": [{"type": "web_search_call"}]}, r"input\[0\].type is 'web_search_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "part of type 'input_image'"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type is 'web_search'"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice names 'f'"),
        ({"truncation": "auto"}, "truncation is 'auto'"),
        ({"conversation": "conv_1"}, "conversation is given"),
        ({"top_logprobs": 3}, "top_logprobs is 3"),
        ({"background": True, "stream": True}, "background is true"),
        ({"text": {"format": {"type": "xml"}}}, "type is 'xml'"),
        ({"input": "word " * 2000}, "maximum context length is 1024"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_what_does_not_fit_is_a_400_that_names_it(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        create(client, **fields)


def test_a_response_that_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(create(client, store=False, max_output_tokens=1).id)


def test_the_store_is_bounded_by_number_and_by_bytes() -> None:
    def stored(name: str, size: int = 1) -> StoredResponse:
        return StoredResponse({"id": name, "output": ["o"]}, [], [{"text": "x" * size}])

    store = ResponseStore(max_responses=3, max_bytes=10_000)
    for number in range(5):
        store.put(stored(f"r{number}"))
    store.put(stored("r2"))
    assert len(store) == 3 and store.get("r4").items == [{"text": "x"}, "o"]
    store.put(stored("big", 9_000))
    assert len(store) == 3
    store.put(stored("bigger", 9_500))
    assert len(store) == 1 and store.get("bigger")
    store.put(stored("too big", 20_000))
    assert len(store) == 0
    with pytest.raises(APIError):
        store.get("bigger")
