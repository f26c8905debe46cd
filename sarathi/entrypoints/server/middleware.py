"""Middleware: request ids, error formats, API keys, and limits on the body."""

import asyncio
import hmac
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sarathi.entrypoints.server.errors import ERROR_BODY, APIError, APIFamily, error_response

_OPEN_PATHS = frozenset({"/", "/health", "/ping", "/ready", "/version", "/metrics", "/docs", "/openapi.json"})
_MOST_ID_CHARACTERS = 128


class RequestId:
    """Returns the request's x-request-id header, or a new id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given[:_MOST_ID_CHARACTERS] or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ErrorFormats:
    """Chooses the error format of a request by its path, for errors of routes and of middleware."""

    def __init__(self, app: ASGIApp, families: Sequence[APIFamily]) -> None:
        self._app = app
        self._families = families

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            body = next((each.error_body for each in self._families if each.has(scope["path"])), None)
            scope = {**scope, ERROR_BODY: body}
        await self._app(scope, receive, send)


class ApiKeys:
    """Status 401 for requests without a valid key, as bearer token or x-api-key, except on the open paths."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["method"] == "OPTIONS" or scope["path"] in _OPEN_PATHS
        if is_open or holds_key(Headers(scope=scope), self._keys):
            await self._app(scope, receive, send)
            return
        error = APIError(401, "the API key is missing or wrong", code="invalid_api_key")
        await error_response(error, scope)(scope, receive, send)


def holds_key(headers: Headers, keys: Sequence[bytes]) -> bool:
    """Whether the request has one of the keys. Compares in constant time."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = (token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode()
    return sum(hmac.compare_digest(given, key) for key in keys) > 0


class BodyLimit:
    """Status 413 for a body above max_bytes, 408 for one that does not arrive within timeout_s."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            await error_response(self._refusal(413), scope)(scope, receive, send)
            return
        await self._app(scope, _LimitedReceive(receive, self._max_bytes, self._timeout_s), send)

    def _refusal(self, status: int) -> APIError:
        return APIError(status, f"the body has more than {self._max_bytes} bytes")


class _LimitedReceive:
    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = self._num_left = max_bytes
        self._timeout_s = timeout_s
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        deadline_s = self._timeout_s
        try:
            message = await asyncio.wait_for(self._receive(), deadline_s)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {deadline_s:g} s") from None
        self._num_left -= len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._num_left < 0:
            raise HTTPException(413, f"the body has more than {self._max_bytes} bytes")
        return message
