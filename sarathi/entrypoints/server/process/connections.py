"""HTTP connections over uvicorn, with limits for the times that a client takes to ask and to read."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server.process.listener import BACKLOG

_FAREWELL_S = 5  # for answers to be sent once the server ends


class HttpServer(uvicorn.Server):
    """Leaves signals to its caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(app: ASGIApp, config: ServerConfig) -> HttpServer:
    """A server of `app`, not running yet."""

    class Protocol(_TimedProtocol):
        receive_timeout_s, send_timeout_s = config.receive_timeout_s, config.send_timeout_s

    return HttpServer(
        uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_level="warning", access_log=False, backlog=BACKLOG,
            limit_concurrency=config.max_connections, timeout_graceful_shutdown=_FAREWELL_S,
        )
    )  # fmt: skip


class _TimedProtocol(HttpToolsProtocol):
    """Drops a connection whose request has no complete head in time, or whose answer is not read in time.

    Bodies have their limit in the middleware, and connections between two requests theirs in uvicorn.
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
        """The answer fills the buffers."""
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
