"""`sarathi chat --url` against servers made of a few lines: what they get, and what is shown of their answers."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sarathi.entrypoints.cli import main


class Servant(HTTPServer):
    """Answers each POST with the next of `answers`: a status, and the lines of the body."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None, Any]] = []  # path, authorization, body
        self.answers: list[tuple[int, list[str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Servant

    def do_GET(self) -> None:
        self.reply(200, [json.dumps({"object": "list", "data": [{"id": "first"}, {"id": "second"}]})])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, self.headers["authorization"], body))
        self.reply(*self.server.answers.pop(0))

    def reply(self, status: int, lines: list[str]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write("".join(f"{line}\n" for line in lines).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def servant() -> Iterator[Servant]:
    with Servant() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def chunk(**delta: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta}]})


def chat(monkeypatch: pytest.MonkeyPatch, servant: Servant, *lines: str, options: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "--url", servant.url, *options])


ANSWER = [": waiting", "", chunk(role="assistant", content="Grü"), "", chunk(content="n"), "", "data: [DONE]"]
USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 7}}'


def test_a_conversation(
    monkeypatch: pytest.MonkeyPatch, servant: Servant, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    servant.answers = [(200, [chunk(reasoning_content="hm "), *ANSWER]), (200, [*ANSWER[:-1], USAGE, ANSWER[-1]])]
    (tmp_path / "key").write_text("secret\n")
    options = ("--api-key-file", str(tmp_path / "key"), "--system", "be kind", "--max-tokens", "9", "--stop", "x")
    assert chat(monkeypatch, servant, "hi", "more", options=options) == 0
    path, key, body = servant.requests[1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    messages = body.pop("messages")
    assert [each["content"] for each in messages] == ["be kind", "hi", "Grün", "more"]
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user"]
    asked = {"model": "first", "stream": True, "stream_options": {"include_usage": True}}
    assert body == asked | {"max_completion_tokens": 9, "stop": ["x"]}
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"first at {servant.url}/v1/"
    assert shown[2] == "hm Grün" and shown[3].startswith("[3 tokens, ")
    assert shown[4] == "Grün" and shown[5].startswith("[7 tokens, ")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, ['{"error": {"message": "the key is wrong"}}']), "status 401: the key is wrong"),
        ((502, ["bad gateway"]), "status 502: bad gateway"),
        ((200, [chunk(content="a"), 'data: {"error": {"message": "it broke"}}']), "it broke"),
        ((200, ["data: {"]), "not a chunk of a chat completion"),
        ((200, ['data: {"choices": 3}']), "not a chunk of a chat completion"),
    ],
)
def test_what_fails_is_told_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
    servant: Servant,
    capsys: pytest.CaptureFixture[str],
    answer: tuple[int, list[str]],
    message: str,
) -> None:
    servant.answers = [answer, (200, ANSWER)]
    assert chat(monkeypatch, servant, "bad", "good", options=("--model", "second")) == 0
    assert message in capsys.readouterr().err
    assert servant.requests[1][2]["messages"] == [{"role": "user", "content": "good"}]
    assert servant.requests[1][2]["model"] == "second"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "ftp://host"), "url is 'ftp://host'"),
        (("--url", "http://127.0.0.1:9/v1"), "http://127.0.0.1:9/v1/: "),
        (("--url", "http://127.0.0.1:9", "--memory-bytes", "1gb"), "cache.memory_bytes: options of an engine"),
        (("--api-key-file", "key"), "needs --url"),
        (("--url", "http://127.0.0.1:9", "--api-key-file", "/nowhere"), "/nowhere"),
    ],
)
def test_options_that_cannot_work(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str) -> None:
    assert main(["chat", *options]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
