"""One forwarded request at a replica's application: its response as a stream of pieces."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Scope

from sarathi.entrypoints.replicas.messages import Begun, ForwardedRequest, Head, Piece, WholeAnswer

CURRENT: "ContextVar[Exchange]" = ContextVar("exchange")
"""The exchange of the current task."""


class Exchange:
    """Calls an ASGI application once. Closing `pieces` is a client disconnect."""

    def __init__(self, app: ASGIApp, request: ForwardedRequest) -> None:
        self._app = app
        self._request = request
        self._pieces: list[Piece] = []
        self._is_filled = asyncio.Event()
        self._is_received = False
        self.has_begun = False

    def begin(self) -> None:
        """Signal that the engine has computed the first token."""
        self.has_begun = True
        self._put(Begun())

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The head, then the body; bytes that arrived since the last piece are joined. Raises the application's
        exception if it came before the response."""
        task = asyncio.create_task(self._run())
        try:
            while not task.done() or self._pieces:
                await self._is_filled.wait()
                self._is_filled.clear()
                pieces, self._pieces = self._pieces, []
                for each in _joined(pieces):
                    yield each
            await task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def whole(self, replica: str) -> WholeAnswer:
        """The complete response."""
        head, body = Head(500, ()), b""
        async for each in self.pieces():
            if isinstance(each, Head):
                head = each
            elif isinstance(each, bytes):
                body += each
        return WholeAnswer(replica, head, body)

    async def _run(self) -> None:
        CURRENT.set(self)
        has_answered = False

        async def send(message: Message) -> None:
            nonlocal has_answered
            has_answered = True
            self._send(message)

        try:
            await self._app(_scope(self._request), self._receive, send)
        except Exception:
            if not has_answered:
                raise
        finally:
            self._is_filled.set()

    def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._put(Head(message["status"], tuple((bytes(name), bytes(value)) for name, value in message["headers"])))
        elif message.get("body"):
            self._put(bytes(message["body"]))

    async def _receive(self) -> Message:
        if self._is_received:
            await asyncio.Event().wait()  # a disconnect cancels the task
        self._is_received = True
        return {"type": "http.request", "body": self._request.body, "more_body": False}

    def _put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self._is_filled.set()


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for each in pieces:
        if isinstance(each, bytes) and joined and isinstance(joined[-1], bytes):
            joined[-1] += each
        else:
            joined.append(each)
    return joined


def _scope(request: ForwardedRequest) -> Scope:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method, "scheme": "http",
        "path": request.path, "raw_path": request.path.encode(), "root_path": "", "query_string": request.query,
        "headers": list(request.headers), "client": None, "server": None,
    }  # fmt: skip
