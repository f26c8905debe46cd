"""Anthropic's Messages API over a real server with SmolLM2, through Anthropic's own client."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import pytest
from http_server import RunningServer

MODEL = "smollm2-135m"
ASK: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Weather", "input_schema": CITY}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


GREEDY = {"temperature": 0.0}  # newer clients have no parameter for it


def create(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "messages": ASK, "max_tokens": 24, "extra_body": GREEDY, **fields})


def test_an_answer_whole_streamed_and_counted(client: anthropic.Anthropic) -> None:
    whole = create(client)
    assert whole.content[0].text == "The capital of France is Paris." and whole.stop_reason == "end_turn"
    assert whole.role == "assistant" and whole.id.startswith("msg_") and whole.model == MODEL
    with client.messages.stream(model=MODEL, messages=ASK, max_tokens=24, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert streamed.content[0].text == whole.content[0].text and streamed.usage == whole.usage
    assert streamed.stop_reason == "end_turn"
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    counted = client.messages.count_tokens(model=MODEL, messages=ASK)
    assert counted.input_tokens == whole.usage.input_tokens > 0


def test_system_blocks_and_an_answer_that_is_begun_are_in_the_prompt(client: anthropic.Anthropic) -> None:
    def count(**fields: Any) -> int:
        return client.messages.count_tokens(**{"model": MODEL, "messages": ASK, **fields}).input_tokens

    system = [{"type": "text", "text": "You are a poet."}, {"type": "text", "text": "You rhyme."}]
    assert count(system=system) == count(system="You are a poet.\nYou rhyme.") != count()
    begun = [*ASK, {"role": "assistant", "content": "The capital of France is"}]
    assert create(client, messages=begun).content[0].text.strip() == "Paris."
    assert count(tools=[WEATHER]) > count() + 20


def test_max_tokens_and_stop_sequences_are_told(client: anthropic.Anthropic) -> None:
    cut = create(client, max_tokens=2)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    stopped = create(client, stop_sequences=["Paris", "Rome"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    assert stopped.content[0].text == "The capital of France is "


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_that_must_be_used(client: anthropic.Anthropic, choice: Any) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 100}
    whole = create(client, **fields)
    [block] = whole.content
    assert whole.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "get_weather"
    jsonschema.validate(block.input, CITY)
    with client.messages.stream(**{"model": MODEL, "messages": ASK, "extra_body": GREEDY, **fields}) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].input == block.input and streamed.stop_reason == "tool_use"

    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sunny"}]}
    messages = [*ASK, {"role": "assistant", "content": [block.model_dump()]}, {"role": "user", "content": [result]}]
    assert create(client, messages=messages, tools=[WEATHER], max_tokens=4).usage.input_tokens > 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra_body": {"temperature": -1}}, "temperature is -1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, r"tools\[0\].name is 'a b'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, r"tools\[0\].type is 'bash_20250124'"),
        ({"tool_choice": {"type": "any"}}, "it needs tools"),
        ({"messages": [{"role": "judge", "content": "x"}]}, r"messages\[0\].role is 'judge'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "this model takes text"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is 3"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "maximum context length is 1024"),
    ],
)
def test_what_does_not_fit_is_a_400_in_anthropics_form(
    client: anthropic.Anthropic, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as error:
        create(client, **fields)
    assert error.value.body["type"] == "error"  # type: ignore[index]
    assert error.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_unknown_models_and_broken_bodies(server: RunningServer, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        create(client, model="claude")
    answer = server.post("/v1/messages", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["type"] == "error"
    missing = server.post("/v1/messages", json={"model": MODEL, "messages": ASK})
    assert missing.status_code == 400 and "max_tokens" in json.dumps(missing.json())
