"""`sarathi serve --replicas N`: the gateway in this process, the engines as replicas in a Ray cluster.

Uses the cluster of RAY_ADDRESS or `ray start`; otherwise starts Ray on this machine and stops it at the end.
"""

import asyncio
import logging
import socket
import uuid

import ray
from ray import serve as ray_serve

from sarathi.config.scaling import ScalingConfig
from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.engine.build import build_tokenizer
from sarathi.engine.core_process.client import CoreStartError
from sarathi.entrypoints.replicas.application import ServeReplicas, engines
from sarathi.entrypoints.replicas.gateway import Gateway
from sarathi.entrypoints.replicas.resources import check_room
from sarathi.entrypoints.routers import ROUTERS
from sarathi.entrypoints.server.app import with_middleware
from sarathi.entrypoints.server.process.connections import make_http_server
from sarathi.entrypoints.server.process.listener import announce, bind
from sarathi.entrypoints.server.process.shutdown import Shutdown, run_until_ended


def run(engine: EngineConfig, config: ServerConfig, scaling: ScalingConfig) -> int:
    """Serve until a signal arrives; returns the exit code. Raises errors about the model or the address."""
    import uvloop

    with bind(config.host, config.port) as listener:
        build_tokenizer(engine)
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
        try:
            check_room(engine, scaling)
            return uvloop.run(_serve(listener, engine, config, scaling))
        finally:
            ray.shutdown()


class ReplicaService:
    """A Serve application and its gateway."""

    def __init__(self) -> None:
        self._name = f"sarathi-{uuid.uuid4().hex[:8]}"
        self.gateway: Gateway

    @classmethod
    async def start(cls, engine: EngineConfig, config: ServerConfig, scaling: ScalingConfig) -> "ReplicaService":
        """Return when all replicas are ready. Raises CoreStartError."""
        service = cls()
        try:
            await asyncio.to_thread(service._deploy, engines(engine, config, scaling))
        except asyncio.CancelledError:
            ray.shutdown()  # also deletes the deployment
            raise
        return service

    async def wait_until_dead(self) -> None:
        """Never returns: Serve restarts replicas."""
        await asyncio.Event().wait()

    async def drain(self, timeout_s: float) -> None:
        await self.gateway.drain(timeout_s)
        await asyncio.to_thread(ray_serve.delete, self._name)  # open requests end with an error

    def kill(self) -> None:
        """Nothing to do: a Ray that this process started ends with it."""

    def _deploy(self, application: ray_serve.Application) -> None:
        ray_serve.start(proxy_location="Disabled")
        try:
            handle = ray_serve.run(application, name=self._name, route_prefix=None)
        except RuntimeError:
            raise CoreStartError(ray_serve.status().applications[self._name].message) from None
        self.gateway = Gateway(ServeReplicas(handle))


async def _serve(listener: socket.socket, engine: EngineConfig, config: ServerConfig, scaling: ScalingConfig) -> int:
    shutdown = Shutdown()
    service = await shutdown.unless_requested(ReplicaService.start(engine, config, scaling))
    if service is None:
        return 0
    server = make_http_server(with_middleware(service.gateway, config, ROUTERS), config)
    announce(config.model_names(engine.model.model)[0], listener)
    await run_until_ended(server, listener, service, shutdown, config.shutdown_timeout_s)
    return 0
