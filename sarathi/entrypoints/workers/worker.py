"""One API process: connects to the core and serves HTTP; ends with the supervisor or the core.

Setup arrives on standard input, which is open while the supervisor lives. Heartbeats go to standard output.
"""

import asyncio
import os
import pickle
import sys
from functools import partial

from sarathi.config.schema import EngineConfig
from sarathi.engine.admission import QueueLimits
from sarathi.engine.async_llm import AsyncLLM
from sarathi.engine.core_process.connection import CoreConnection
from sarathi.entrypoints.routers import ROUTERS
from sarathi.entrypoints.server.app import create_app
from sarathi.entrypoints.server.process.connections import HttpServer, make_http_server
from sarathi.entrypoints.server.process.lifecycle import DIED
from sarathi.entrypoints.server.process.listener import bind
from sarathi.entrypoints.server.process.service import EngineService, Observe, StartEngine
from sarathi.entrypoints.server.process.shutdown import Shutdown, run_until_ended
from sarathi.entrypoints.workers.setup import ALIVE, BEAT_S, READY, WorkerSetup
from sarathi.parent_death import continue_without_parent


def main() -> None:
    """Run the process."""
    import uvloop

    continue_without_parent()
    setup: WorkerSetup = pickle.load(sys.stdin.buffer)
    sys.exit(uvloop.run(_serve(setup)))


async def _serve(setup: WorkerSetup) -> int:
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, DIED)  # end of input: the supervisor died
    shutdown, config = Shutdown(), setup.server
    service = await shutdown.unless_requested(
        EngineService.start(setup.engine, config, _join(setup), setup.metrics_folder)
    )
    if service is None:
        return 0
    llm = service.context.llm
    server = make_http_server(create_app(service.context, config, ROUTERS), config)
    with bind(config.host, setup.port, shared=True) as listener:
        beating = asyncio.create_task(_beat(server))
        try:
            await run_until_ended(server, listener, service, shutdown, config.shutdown_timeout_s)
        finally:
            beating.cancel()
            await llm.shutdown()
    return DIED if llm.error else 0


def _join(setup: WorkerSetup) -> StartEngine:
    """Connects to the running core. The supervisor watches for the core's death."""

    async def join(
        config: EngineConfig, *, heartbeat_timeout_s: float, limits: QueueLimits, observe: Observe
    ) -> AsyncLLM:
        connect = partial(CoreConnection.join, setup.core_folder, setup.name, setup.core_life)
        return await AsyncLLM.join(config, connect, limits=limits, observe=observe)

    return join


async def _beat(server: HttpServer) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    os.write(sys.stdout.fileno(), READY)
    while True:
        os.write(sys.stdout.fileno(), ALIVE)
        await asyncio.sleep(BEAT_S)
