"""The server process: an engine, the application over it, and their end."""

import socket
from collections.abc import Sequence

import uvicorn
from fastapi import APIRouter, FastAPI

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.engine.async_llm import AsyncLLM
from sarathi.entrypoints.parsing.turn import ModelFormat
from sarathi.entrypoints.server.app import create_app
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.metrics import ServerMetrics

DIED = 1
_BACKLOG = 2048  # connections that wait to be accepted


async def serve(engine: EngineConfig, config: ServerConfig, routers: Sequence[APIRouter]) -> int:
    """Serve until a signal ends the server, or the engine dies; the exit code. OSError where the port is taken."""
    names = config.model_names(engine.model.model)
    metrics = ServerMetrics(names[0])
    with _bind(config.host, config.port) as listener:
        llm = await AsyncLLM.start(engine, heartbeat_timeout_s=config.heartbeat_timeout_s, observe=metrics.observe)
        try:
            model_format = ModelFormat.of(llm.tokenizer, config.tool_call_parser, config.reasoning_parser)
            app = create_app(ServerContext(llm, names, engine.model.model, metrics, model_format), routers)
            print(f"{names[0]} is served on {_url(listener)}", flush=True)
            await _http_server(app).serve(sockets=[listener])
            return DIED if llm.error else 0
        finally:
            await llm.shutdown()


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


def _http_server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, backlog=_BACKLOG))
