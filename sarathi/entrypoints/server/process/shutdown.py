"""Shutdown of a server: by a signal, which drains it, or because the service behind it died."""

import asyncio
import os
import signal
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from sarathi.entrypoints.server.process.connections import HttpServer

DEATH_NOTICE_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Service(Protocol):
    """The engine or engines behind a server."""

    async def wait_until_dead(self) -> None:
        """Return when the service is dead."""

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait for the running ones; those left after timeout_s end with an error."""

    def kill(self) -> None:
        """Kill its processes."""


S = TypeVar("S", bound=Service)


class Shutdown:
    """Whether SIGTERM or SIGINT arrived. The second signal ends the process at once."""

    def __init__(self) -> None:
        self._is_requested = asyncio.Event()
        self._service: Service | None = None
        for each in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(each, self._on_signal, each)

    async def wait(self) -> None:
        await self._is_requested.wait()

    async def unless_requested(self, starting: Coroutine[Any, Any, S]) -> S | None:
        """The started service, or None if a signal came first."""
        task, signal_task = asyncio.create_task(starting), asyncio.create_task(self.wait())
        await asyncio.wait((task, signal_task), return_when=asyncio.FIRST_COMPLETED)
        signal_task.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            return None
        service = self._service = task.result()
        return service

    def _on_signal(self, number: int) -> None:
        if self._is_requested.is_set():
            if self._service is not None:
                self._service.kill()
            os._exit(128 + number)
        self._is_requested.set()


async def run_until_ended(
    server: HttpServer, listener: socket.socket, service: Service, shutdown: Shutdown, drain_timeout_s: float
) -> None:
    """Run until a signal arrived and requests are drained, or the service is dead and clients were told."""
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    died, ended = asyncio.create_task(service.wait_until_dead()), asyncio.create_task(shutdown.wait())
    await asyncio.wait((serving, died, ended), return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        await asyncio.wait((serving, ended), timeout=DEATH_NOTICE_S, return_when=asyncio.FIRST_COMPLETED)
    elif ended.done():
        await service.drain(drain_timeout_s)
    for each in (died, ended):
        each.cancel()
    server.should_exit = True
    await serving
