"""Errors of every layer of the server, in the form of the API that was asked."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from sarathi.config.server import ServerConfig
from sarathi.engine.admission import OverloadedError
from sarathi.engine.async_llm import EngineUnavailableError
from sarathi.entrypoints import anthropic, openai, responses
from sarathi.entrypoints.parsing.turn import ModelFormat
from sarathi.entrypoints.server.app import create_app
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.metrics import ServerMetrics

KEY = {"x-api-key": "secret"}
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


class RefusingEngine:
    """An engine that raises `error` for every request."""

    def __init__(self) -> None:
        self.error_of_requests: Exception = OverloadedError("too many are waiting", 7)
        self.facts = SimpleNamespace(max_model_len=64)
        self.tokenizer = SimpleNamespace()

    async def encode_chat(self, conversation: Any, **options: Any) -> list[int]:
        return [1, 2, 3]

    async def submit(self, *arguments: Any, **named: Any) -> None:
        raise self.error_of_requests


@pytest.fixture
def engine() -> RefusingEngine:
    return RefusingEngine()


@pytest.fixture
def client(engine: RefusingEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("SARATHI_API_KEYS", "secret")
    context = ServerContext(engine, ("m",), "m", ServerMetrics("m"), ModelFormat.of(None, "auto", "auto"))  # type: ignore[arg-type]
    routers = (*openai.ROUTERS, *responses.ROUTERS, *anthropic.ROUTERS)
    with TestClient(create_app(context, ServerConfig(max_body_bytes=500), routers)) as client:
        yield client


CASES = {
    "a missing key": ({"json": ASK}, 401, "authentication_error"),
    "a large body": ({"json": {**ASK, "system": "x" * 500}, "headers": KEY}, 413, "request_too_large"),
    "another model": ({"json": {**ASK, "model": "other"}, "headers": KEY}, 404, "not_found_error"),
    "a wrong type": ({"json": {**ASK, "messages": 3}, "headers": KEY}, 400, "invalid_request_error"),
    "no JSON": ({"content": b"{", "headers": KEY}, 400, "invalid_request_error"),
}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(("sent", "status", "kind"), CASES.values(), ids=CASES)
def test_messages_have_anthropics_form(
    client: TestClient, path: str, sent: dict[str, Any], status: int, kind: str
) -> None:
    answer = client.post(path, **sent)
    assert answer.status_code == status and answer.headers["x-request-id"]
    body = answer.json()
    assert body == {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}
    assert body["error"]["message"]


@pytest.mark.parametrize("sent", [case[0] for case in CASES.values()], ids=CASES)
def test_chat_completions_have_openais_form(client: TestClient, sent: dict[str, Any]) -> None:
    body = client.post("/v1/chat/completions", **sent).json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}


def test_routes_that_are_not_there(client: TestClient) -> None:
    assert client.post("/v1/messages/batches", json={}, headers=KEY).json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/messages", headers=KEY).json()["type"] == "error"
    assert "code" in client.post("/v1/messagesx", json={}, headers=KEY).json()["error"]


def test_an_engine_that_refuses(client: TestClient, engine: RefusingEngine) -> None:
    busy = client.post("/v1/messages", json=ASK, headers=KEY)
    assert (busy.status_code, busy.json()["error"]["type"]) == (429, "rate_limit_error")
    assert busy.headers["retry-after"] == "7"
    engine.error_of_requests = EngineUnavailableError("the server is draining")
    gone = client.post("/v1/messages", json=ASK, headers=KEY)
    assert (gone.status_code, gone.json()["error"]["type"]) == (503, "overloaded_error")
