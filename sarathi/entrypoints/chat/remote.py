"""A chat model on an OpenAI-compatible server."""

import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import httpx

from sarathi.entrypoints.chat.conversation import Messages, Piece

_KEY_VARIABLE = "OPENAI_API_KEY"
_CONNECT_S, _MODELS_S = 10.0, 30.0  # no read timeout for answers: they may wait in the server's queue
_CHAT_NAMES = {"max_tokens": "max_completion_tokens"}  # fields with another name in the chat API
_REASONING = ("reasoning_content", "reasoning")  # field names in use


class ServerError(ValueError):
    """The server is unreachable, refuses a request, or ends an answer with an error."""


class Server(NamedTuple):
    """url: default path /v1."""

    url: str
    api_key: str | None


def read_api_key(file: str | None) -> str | None:
    """The first line of the file, or else OPENAI_API_KEY, if set. OSError if the file does not exist."""
    if file is None:
        return os.environ.get(_KEY_VARIABLE) or None
    lines = Path(file).expanduser().read_text(encoding="utf-8").split()
    if not lines:
        raise ValueError(f"api_key_file is {file!r}: it contains no key")
    return lines[0]


@contextmanager
def open_remote_model(server: Server, model: str | None, params: Mapping[str, Any]) -> "Iterator[RemoteModel]":
    """model: None: the first that the server lists. params: fields of SamplingParams; others are the server's."""
    headers = {} if server.api_key is None else {"Authorization": f"Bearer {server.api_key}"}
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    with httpx.Client(base_url=_base(server.url), headers=headers, timeout=timeout) as client:
        yield RemoteModel(client, _first_model(client) if model is None else model, params)


class RemoteModel:
    """A ChatModel over HTTP."""

    def __init__(self, client: httpx.Client, model: str, params: Mapping[str, Any]) -> None:
        self._client = client
        self._model = model
        self._fields = {_CHAT_NAMES.get(name, name): value for name, value in params.items()}

    def __str__(self) -> str:
        return f"{self._model} at {self._client.base_url}"

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        body = {
            "model": self._model, "messages": messages, "stream": True, "stream_options": {"include_usage": True},
            **self._fields,
        }  # fmt: skip
        num_tokens = 0
        with _connection_errors(self._client), self._client.stream("POST", "chat/completions", json=body) as response:
            _check(response)
            for chunk in _chunks(response):
                for piece in _pieces(chunk, num_tokens):
                    num_tokens = piece.num_tokens
                    yield piece

    def memory(self) -> str:
        return ""


def _base(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url is {url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url is {url!r}: it must have the form http://127.0.0.1:8000")
    return parsed.copy_with(path="/v1") if parsed.path == "/" else parsed


def _first_model(client: httpx.Client) -> str:
    with _connection_errors(client):
        response = client.get("models", timeout=_MODELS_S)
        _check(response)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ServerError(f"{client.base_url}models lists no model: give --model") from None


@contextmanager
def _connection_errors(client: httpx.Client) -> Iterator[None]:
    """Turn connection errors into ServerError."""
    try:
        yield
    except httpx.HTTPError as error:
        raise ServerError(f"{client.base_url}: {error or type(error).__name__}") from error


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = _message(response.json())
    except ValueError:
        message = response.text[:500]
    raise ServerError(f"{response.url}: status {response.status_code}: {message or response.reason_phrase}")


def _message(body: Any) -> str:
    """The message of an error in OpenAI's format, or the body as text."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events up to [DONE]; ignores other lines."""
    for line in response.iter_lines():
        payload = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if payload == "[DONE]":
            return
        if payload:
            try:
                yield json.loads(payload)
            except ValueError:
                _refuse(payload)


def _pieces(chunk: dict[str, Any], num_tokens: int) -> Iterator[Piece]:
    """Counts a chunk with text as one token until the final usage gives the exact number."""
    if chunk.get("error"):
        raise ServerError(_message(chunk))
    try:
        delta = (chunk["choices"][0].get("delta") or {}) if chunk.get("choices") else {}
        reasoning = next((delta[name] for name in _REASONING if delta.get(name)), "")
        if reasoning or delta.get("content"):
            num_tokens += 1
            yield Piece(reasoning, num_tokens, is_reasoning=True)
            yield Piece(delta.get("content") or "", num_tokens)
        if counted := (chunk.get("usage") or {}).get("completion_tokens"):
            yield Piece("", counted)
    except (AttributeError, LookupError, TypeError):
        _refuse(json.dumps(chunk))


def _refuse(payload: str) -> NoReturn:
    raise ServerError(f"{payload[:200]!r} is not a chunk of a chat completion") from None
