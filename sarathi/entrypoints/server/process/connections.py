"""uvicorn with timeouts on slow clients: for sending a request, and for reading the response."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server.process.listener import BACKLOG

_GRACE_S = 5  # for responses to be sent at shutdown


class HttpServer(uvicorn.Server):
    """Installs no signal handlers: the caller handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(app: ASGIApp, config: ServerConfig) -> HttpServer:
    """A server for `app`, not started yet."""

    class Protocol(_TimedProtocol):
        receive_timeout_s, send_timeout_s = config.receive_timeout_s, config.send_timeout_s

    return HttpServer(
        uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_level="warning", access_log=False, backlog=BACKLOG,
            limit_concurrency=config.max_connections, timeout_graceful_shutdown=_GRACE_S,
        )
    )  # fmt: skip


class _TimedProtocol(HttpToolsProtocol):
    """Closes a connection if the request's headers do not arrive in time, or the response is not read in time.

    The middleware has the timeout for bodies, uvicorn that for idle connections.
    """

    receive_timeout_s: float
    send_timeout_s: float
    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        _cancel(self._receiving)
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """Called when the write buffer is full."""
        super().pause_writing()
        self._sending = self.loop.call_later(self.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._sending)

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._receiving)
        _cancel(self._sending)
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        _cancel(self._receiving)
        self._receiving = self.loop.call_later(self.receive_timeout_s, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
