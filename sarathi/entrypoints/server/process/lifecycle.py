"""The life of a server: an engine is started, the application serves it, and a signal or the engine's death ends both.

The first SIGTERM or SIGINT drains: new requests get status 503, those under way may end, and what is left after the
timeout is ended with an error. The second one ends the process at once. When the engine has died, /health tells so for
a few seconds before the process ends with exit code 1.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import APIRouter

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.engine.admission import QueueLimits
from sarathi.engine.async_llm import AsyncLLM
from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.parsing.turn import ModelFormat
from sarathi.entrypoints.server.app import create_app
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.metrics import ServerMetrics
from sarathi.entrypoints.server.process.connections import HttpServer, make_http_server
from sarathi.entrypoints.server.process.log import RequestLog, write_status

DIED = 1
DEATH_NOTICE_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(engine: EngineConfig, config: ServerConfig, routers: Sequence[APIRouter]) -> int:
    """Serve until a signal ends the server, or the engine dies; the exit code. OSError where the port is taken."""
    names = config.model_names(engine.model.model)
    metrics = ServerMetrics(names[0])
    end = _End()
    with _bind(config.host, config.port) as listener:
        limits = QueueLimits(config.max_waiting_requests, config.max_waiting_tokens)
        observe = _observer(config, metrics)
        starting = AsyncLLM.start(
            engine, heartbeat_timeout_s=config.heartbeat_timeout_s, limits=limits, observe=observe
        )
        llm = await end.unless_requested(starting)
        if llm is None:
            return 0
        model_format = ModelFormat.of(llm.tokenizer, config.tool_call_parser, config.reasoning_parser)
        context = ServerContext(llm, names, engine.model.model, metrics, model_format, config.request_timeout_s)
        server = make_http_server(create_app(context, config, routers), config)
        try:
            print(f"{names[0]} is served on {_url(listener)}", flush=True)
            with _status_lines(context, config.log_interval_s):
                await _run(server, listener, context, end, config.shutdown_timeout_s)
        finally:
            await llm.shutdown()
    return DIED if llm.error else 0


def _observer(config: ServerConfig, metrics: ServerMetrics) -> Callable[[RequestOutput], None]:
    if not config.log_requests:
        return metrics.observe
    log = RequestLog(texts=config.log_texts)

    def observe(output: RequestOutput) -> None:
        metrics.observe(output)
        log.observe(output)

    return observe


@contextmanager
def _status_lines(context: ServerContext, interval_s: float | None) -> Iterator[None]:
    if interval_s is None:
        yield
        return
    writing = asyncio.create_task(write_status(context.llm, context.metrics, interval_s))
    try:
        yield
    finally:
        writing.cancel()


class _End:
    """Whether a signal has asked for the end. After the second one there is no process."""

    def __init__(self) -> None:
        self._is_requested = asyncio.Event()
        self.llm: AsyncLLM | None = None
        for each in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(each, self._on_signal, each)

    async def wait(self) -> None:
        await self._is_requested.wait()

    async def unless_requested(self, starting: Coroutine[Any, Any, AsyncLLM]) -> AsyncLLM | None:
        """The started engine; None where a signal came first."""
        task, end = asyncio.create_task(starting), asyncio.create_task(self.wait())
        await asyncio.wait((task, end), return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            return None
        self.llm = task.result()
        return self.llm

    def _on_signal(self, number: int) -> None:
        if self._is_requested.is_set():
            if self.llm is not None:
                self.llm.kill()
            os._exit(128 + number)
        self._is_requested.set()


async def _run(
    server: HttpServer, listener: socket.socket, context: ServerContext, end: _End, drain_timeout_s: float
) -> None:
    """Until the end is requested and requests have ended, or the engine has died and its death was told."""
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    died, ended = asyncio.create_task(context.llm.wait_until_dead()), asyncio.create_task(end.wait())
    await asyncio.wait((serving, died, ended), return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        await asyncio.wait((serving, ended), timeout=DEATH_NOTICE_S, return_when=asyncio.FIRST_COMPLETED)
    elif ended.done():
        await _drain(context, drain_timeout_s)
    for task in (died, ended):
        task.cancel()
    server.should_exit = True
    await serving


async def _drain(context: ServerContext, timeout_s: float) -> None:
    context.is_draining = True
    context.llm.refuse_requests("the server is draining: it takes no new requests")
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(context.llm.wait_until_idle(), timeout_s)
    await context.llm.shutdown()  # requests that are left end with an error, while their connections are open


def _bind(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a taken port is told at once; clients are let in later."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
