"""How a server ends: by a signal, which drains it, or by the death of what it serves."""

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
    """What a server answers from."""

    async def wait_until_dead(self) -> None:
        """Return when no request can be answered any more."""

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and return when those under way have ended, the rest with an error."""

    def kill(self) -> None:
        """End its processes at once."""


S = TypeVar("S", bound=Service)


class End:
    """Whether a signal has asked for the end. After the second one there is no process."""

    def __init__(self) -> None:
        self._is_requested = asyncio.Event()
        self._service: Service | None = None
        for each in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(each, self._on_signal, each)

    async def wait(self) -> None:
        await self._is_requested.wait()

    async def unless_requested(self, starting: Coroutine[Any, Any, S]) -> S | None:
        """The started service; None where a signal came first."""
        task, end = asyncio.create_task(starting), asyncio.create_task(self.wait())
        await asyncio.wait((task, end), return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
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
    server: HttpServer, listener: socket.socket, service: Service, end: End, drain_timeout_s: float
) -> None:
    """Until the end is requested and requests have ended, or the service has died and its death was told."""
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    died, ended = asyncio.create_task(service.wait_until_dead()), asyncio.create_task(end.wait())
    await asyncio.wait((serving, died, ended), return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        await asyncio.wait((serving, ended), timeout=DEATH_NOTICE_S, return_when=asyncio.FIRST_COMPLETED)
    elif ended.done():
        await service.drain(drain_timeout_s)
    for each in (died, ended):
        each.cancel()
    server.should_exit = True
    await serving
