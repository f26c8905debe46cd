"""The life of a server: an engine is started, the application serves it, and a signal or the engine's death ends both.

The first SIGTERM or SIGINT drains: new requests get status 503, those under way may end, and what is left after the
timeout is ended with an error. The second one ends the process at once. When the engine has died, /health tells so for
a few seconds before the process ends with exit code 1.
"""

from collections.abc import Sequence

from fastapi import APIRouter

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.entrypoints.server.app import create_app
from sarathi.entrypoints.server.process.connections import make_http_server
from sarathi.entrypoints.server.process.end import End, run_until_ended
from sarathi.entrypoints.server.process.listener import announce, bind
from sarathi.entrypoints.server.process.log import status_lines
from sarathi.entrypoints.server.process.service import EngineService

DIED = 1


async def serve(engine: EngineConfig, config: ServerConfig, routers: Sequence[APIRouter]) -> int:
    """Serve until a signal ends the server, or the engine dies; the exit code. OSError where the port is taken."""
    end = End()
    with bind(config.host, config.port) as listener:
        service = await end.unless_requested(EngineService.start(engine, config))
        if service is None:
            return 0
        context = service.context
        server = make_http_server(create_app(context, config, routers), config)
        try:
            announce(context.model_name, listener)
            with status_lines(context.llm.stats, context.metrics, config.log_interval_s):
                await run_until_ended(server, listener, service, end, config.shutdown_timeout_s)
        finally:
            await context.llm.shutdown()
    return DIED if context.llm.error else 0
