"""Send and time one streaming request to an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp

DONE = "[DONE]"
STREAMING = {"stream": True, "stream_options": {"include_usage": True}}  # of every request


@dataclass(frozen=True)
class OutgoingRequest:
    """send_at_s: seconds after the first request. prompt: token ids, or text. num_prompt_tokens: exact or estimated.

    conversation: requests with the same number are its turns; then send_at_s counts from the previous answer.
    history: texts of the previous turns and their answers.
    """

    send_at_s: float
    prompt: str | list[int]
    num_prompt_tokens: int
    max_tokens: int
    conversation: int | None = None
    history: tuple[str, ...] = ()


@dataclass(frozen=True)
class Endpoint:
    """Server address and request settings. body: fields of all requests."""

    url: str
    is_chat: bool
    body: Mapping[str, Any]


@dataclass
class RequestResult:
    """The result of one request; times are seconds of one clock. error: empty on success.

    due_at_s: scheduled send time; earlier than sent_at_s if --max-concurrency delayed it. chunk_times_s: arrival of
    each chunk with a token. output_tokens: the server's count if is_counted, else the number of chunks. closed_at_s:
    arrival of a final chunk without a token. cached_tokens: cached prompt tokens, as reported by the server.
    """

    sent_at_s: float
    prompt_tokens: int
    output_tokens: int = 0
    chunk_times_s: list[float] = field(default_factory=list)
    ended_at_s: float = 0.0
    text: str = ""
    error: str = ""
    closed_at_s: float | None = None
    due_at_s: float = 0.0
    is_counted: bool = False
    cached_tokens: int = 0

    @property
    def queued_s(self) -> float:
        """Seconds in the client's queue before it was sent."""
        return self.sent_at_s - self.due_at_s

    @property
    def ttft_s(self) -> float:
        return self.chunk_times_s[0] - self.sent_at_s

    @property
    def latency_s(self) -> float:
        """Seconds to the last chunk with a token."""
        return self.chunk_times_s[-1] - self.sent_at_s

    @property
    def itls_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.chunk_times_s)]


async def send(
    session: aiohttp.ClientSession, endpoint: Endpoint, request: OutgoingRequest, due_at_s: float | None = None
) -> RequestResult:
    """Send a request and read its stream. Failures are stored in the result, never raised. due_at_s: None: now."""
    now_s = time.perf_counter()
    result = RequestResult(now_s, request.num_prompt_tokens, due_at_s=now_s if due_at_s is None else due_at_s)
    try:
        async with session.post(endpoint.url, json=_body(endpoint, request)) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {(await response.text())[:500]}"
            else:
                await _read(response, endpoint, result)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        result.error = f"{type(error).__name__}: {error}"
    result.ended_at_s = time.perf_counter()
    if not result.error and not result.chunk_times_s:
        result.error = "the stream ended without a token"
    return result


def _body(endpoint: Endpoint, request: OutgoingRequest) -> dict[str, Any]:
    shared = {**endpoint.body, **STREAMING}
    texts = [*request.history, request.prompt]
    if endpoint.is_chat:
        contents = [[{"type": "text", "text": text}] for text in texts]
        messages = [{"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(contents)]
        return {"messages": messages, "max_completion_tokens": request.max_tokens} | shared
    prompt = " ".join(map(str, texts)) if request.history else request.prompt
    return {"prompt": prompt, "max_tokens": request.max_tokens} | shared


async def _read(response: aiohttp.ClientResponse, endpoint: Endpoint, result: RequestResult) -> None:
    ended = False
    async for data in _events(response):
        if data == DONE:
            ended = True
            break
        try:
            ended = _take_chunk(json.loads(data), endpoint.is_chat, result) or ended
        except (AttributeError, LookupError, TypeError, ValueError):
            raise ValueError(f"{data[:200]!r} is no chunk of a completion") from None
        if result.error:
            return
    if not ended:
        result.error = "the stream ended before the answer did"
    if result.closed_at_s is not None and len(result.chunk_times_s) < max(result.output_tokens, 1):
        result.chunk_times_s.append(result.closed_at_s)  # it held the last token: an end without text, or held back
    result.output_tokens = result.output_tokens or len(result.chunk_times_s)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """Payloads of server-sent events; skips comments, empty events and other fields. Chunk boundaries do not matter.

    An unterminated last line counts.
    """
    pending = b""
    async for piece in response.content.iter_any():
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            if payload := _payload(line):
                yield payload
    if payload := _payload(pending):
        yield payload


def _payload(line: bytes) -> str:
    return line[5:].strip().decode() if line.startswith(b"data:") else ""


def _take_chunk(chunk: Mapping[str, Any], is_chat: bool, result: RequestResult) -> bool:
    """Process a chunk; returns whether the answer is complete or the server reported an error."""
    if error := chunk.get("error"):
        result.error = str(error.get("message", error) if isinstance(error, dict) else error)
        return True
    ends = bool(chunk.get("choices")) and _take_choice(chunk["choices"][0], is_chat, result)
    _take_usage(chunk.get("usage"), result)
    return ends


def _take_choice(choice: Mapping[str, Any], is_chat: bool, result: RequestResult) -> bool:
    """Whether the answer is complete. A chunk without text is a token unless it only has the role or finish reason."""
    delta = (choice.get("delta") or {}) if is_chat else {"content": choice.get("text")}
    ends = bool(choice.get("finish_reason"))
    if any(value for name, value in delta.items() if name != "role") or not (delta.get("role") or ends):
        result.chunk_times_s.append(time.perf_counter())
        result.text += delta.get("content") or ""
    elif ends:
        result.closed_at_s = time.perf_counter()
    return ends


def _take_usage(usage: Mapping[str, Any] | None, result: RequestResult) -> None:
    if usage:
        result.is_counted = True
        result.output_tokens = int(usage.get("completion_tokens") or 0)
        result.prompt_tokens = int(usage.get("prompt_tokens") or result.prompt_tokens)
        result.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
