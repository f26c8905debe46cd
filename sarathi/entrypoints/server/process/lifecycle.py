"""The life of a server: start the engine, serve, and shut down on a signal or when the engine dies.

The first SIGTERM or SIGINT drains: new requests get status 503, running requests finish, and those left after the
timeout end with an error. The second signal ends the process at once. When the engine has died, /health returns 503 for
a few seconds before the process exits with code 1.
"""

from collections.abc import Sequence

from fastapi import APIRouter

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server.app import create_app
from sarathi.entrypoints.server.process.connections import make_http_server
from sarathi.entrypoints.server.process.listener import announce, bind
from sarathi.entrypoints.server.process.log import status_lines
from sarathi.entrypoints.server.process.service import EngineService
from sarathi.entrypoints.server.process.shutdown import Shutdown, run_until_ended

DIED = 1


async def serve(engine: EngineConfig, config: ServerConfig, routers: Sequence[APIRouter]) -> int:
    """Serve until a signal arrives or the engine dies; returns the exit code. OSError if the port is in use."""
    shutdown = Shutdown()
    with bind(config.host, config.port) as listener:
        service = await shutdown.unless_requested(EngineService.start(engine, config))
        if service is None:
            return 0
        context = service.context
        server = make_http_server(create_app(context, config, routers), config)
        try:
            announce(context.model_name, listener)
            with status_lines(context.llm.stats, context.metrics, config.log_interval_s):
                await run_until_ended(server, listener, service, shutdown, config.shutdown_timeout_s)
        finally:
            await context.llm.shutdown()
    return DIED if context.llm.error else 0
