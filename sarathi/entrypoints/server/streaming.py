"""Responses that are cancelled when the client disconnects: server-sent events, and single responses."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from sarathi.entrypoints.server.errors import ClientDisconnectedError, as_api_error

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
Events = AsyncGenerator[bytes, None]


def event(content: Any, name: str | None = None) -> bytes:
    """A server-sent event with `content` as JSON."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (head, msgspec.json.encode(content))


def openai_error_event(error: Exception) -> bytes:
    """The last event of a failed stream, in OpenAI's format."""
    return event(as_api_error(error).body())


def json_response(content: Any) -> Response:
    """`content` as JSON, encoded by msgspec."""
    return Response(msgspec.json.encode(content), media_type="application/json")


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Cancels it if the client disconnects first."""
    task, watch = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they arrive. An exception becomes the last event; a disconnect closes the generator."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, error_event: Callable[[Exception], bytes] = openai_error_event) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnectedError):
            await until_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for each in events:
                    await send({"type": "http.response.body", "body": each, "more_body": True})
            except Exception as error:
                body = self._error_event(error)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
