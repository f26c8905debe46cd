"""`sarathi serve --api-workers N`: this process owns the address, the signals and the core; N others serve HTTP.

An API process that dies or hangs is replaced, and its requests are aborted. SIGTERM drains all of them.
"""

import asyncio
import logging
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.engine.build import build_core, build_tokenizer
from sarathi.engine.core_process.client import CoreProcess
from sarathi.engine.core_process.link import CoreDiedError
from sarathi.entrypoints.server.metrics import SharedCounts
from sarathi.entrypoints.server.process.lifecycle import DIED
from sarathi.entrypoints.server.process.listener import bind, share, url_of
from sarathi.entrypoints.server.process.log import status_lines
from sarathi.entrypoints.server.process.shutdown import DEATH_NOTICE_S, Shutdown
from sarathi.entrypoints.workers.process import WorkerProcess
from sarathi.entrypoints.workers.setup import WorkerSetup, share_of
from sarathi.messages import CoreOutput

logger = logging.getLogger(__name__)
_MAX_FAILED_STARTS = 3
_RETRY_S = 0.5
_GRACE_S = 10.0  # beyond the time for requests to finish


class WorkerStartError(RuntimeError):
    """API processes repeatedly ended while starting."""


async def serve(engine: EngineConfig, config: ServerConfig, count: int) -> int:
    """Serve until a signal arrives or the engine dies; returns the exit code. OSError if the port is in use."""
    shutdown = Shutdown()
    with ExitStack() as resources:
        listener = resources.enter_context(bind(config.host, config.port))
        share(listener)
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="sarathi-metrics-")))
        service = await shutdown.unless_requested(Supervisor.start(engine, config, count, listener, folder))
        if service is None:
            return 0
        try:
            print(f"{config.model_names(engine.model.model)[0]} is served on {url_of(listener)}", flush=True)
            with status_lines(service.core.stats, SharedCounts(folder), config.log_interval_s):
                await service.run_until_ended(shutdown)
        finally:
            await service.close()
    return DIED if service.core.error else 0


class Supervisor:
    """An engine core and its API processes."""

    def __init__(self, core: CoreProcess, setup: WorkerSetup, count: int) -> None:
        self.core = core
        self._setup, self._count = setup, count
        self._workers: dict[int, WorkerProcess] = {}
        self._is_ending = False
        self._died, self._all_ready = asyncio.Event(), asyncio.Event()
        self._num_started = 0
        core.listen(self)
        self._places = [asyncio.create_task(self._keep(place)) for place in range(count)]

    @classmethod
    async def start(
        cls, engine: EngineConfig, config: ServerConfig, count: int, listener: socket.socket, metrics_folder: Path
    ) -> "Supervisor":
        """Return when all processes accept connections."""
        await asyncio.to_thread(build_tokenizer, engine)  # reports a wrong model name once, not from each process
        life, held = os.pipe()
        try:
            core = await CoreProcess.start(partial(build_core, engine), config.heartbeat_timeout_s, pass_fds=[held])
        finally:
            os.close(held)
        port = listener.getsockname()[1]
        setup = WorkerSetup(engine, share_of(config, count), "", core.folder, life, port, metrics_folder)
        supervisor = cls(core, setup, count)
        try:
            await supervisor._wait_until_ready()
        except BaseException:
            await supervisor.close()
            raise
        return supervisor

    async def wait_until_dead(self) -> None:
        await self._died.wait()

    async def run_until_ended(self, shutdown: Shutdown) -> None:
        """Run until a signal arrived and requests are drained, or the core is dead and clients were told. Raises
        WorkerStartError."""
        died, ended = asyncio.create_task(self._died.wait()), asyncio.create_task(shutdown.wait())
        done, _ = await asyncio.wait((died, ended, *self._places), return_when=asyncio.FIRST_COMPLETED)
        for task in (died, ended):
            task.cancel()
        for place in done.intersection(self._places):
            place.result()
        if not self._died.is_set():
            await self.drain(self._setup.server.shutdown_timeout_s)
        else:
            await asyncio.wait(self._places, timeout=DEATH_NOTICE_S + _GRACE_S)

    async def drain(self, timeout_s: float) -> None:
        """Make every process drain, and wait until all have ended."""
        self._is_ending = True
        for worker in self._workers.values():
            worker.terminate()
        await asyncio.wait(self._places, timeout=timeout_s + _GRACE_S)

    async def close(self) -> None:
        """End the remaining processes."""
        self._is_ending = True
        for place in self._places:
            place.cancel()
        for worker in self._workers.values():
            worker.kill()
        await self.core.close()
        os.close(self._setup.core_life)

    def kill(self) -> None:
        """Kill all processes."""
        for worker in self._workers.values():
            worker.kill()
        self.core.kill()

    async def _wait_until_ready(self) -> None:
        ready = asyncio.create_task(self._all_ready.wait())
        await asyncio.wait((ready, *self._places), return_when=asyncio.FIRST_COMPLETED)
        for place in self._places:
            if place.done():
                place.result()
        ready.cancel()
        if self.core.error is not None:
            raise self.core.error

    async def _keep(self, place: int) -> None:
        """Restart a process whenever it ends."""
        num_failed = 0
        while not self._is_ending and self.core.error is None:
            worker = await self._start_one(place)
            code = await worker.wait(self._setup.server.heartbeat_timeout_s)
            self.core.leave(worker.name)
            num_failed = 0 if worker.is_ready else num_failed + 1
            if num_failed == _MAX_FAILED_STARTS:
                raise WorkerStartError(f"an API process ended with exit code {code} while it started")
            if not self._is_ending and self.core.error is None:
                logger.warning("an API process ended with exit code %d: starting another one", code)
                await asyncio.sleep(_RETRY_S)

    async def _start_one(self, place: int) -> WorkerProcess:
        """A process that is ready, or has ended while starting."""
        self._num_started += 1
        worker = await WorkerProcess.start(replace(self._setup, name=f"api{self._num_started}-"))
        self._workers[place] = worker
        is_ready = await worker.wait_until_ready()
        if is_ready and len(self._workers) == self._count and all(each.is_ready for each in self._workers.values()):
            self._all_ready.set()
        return worker

    # Callbacks of the core: this process has no requests.

    def on_outputs(self, output: CoreOutput) -> None: ...

    def on_refused(self, request_ids: Sequence[str], message: str) -> None: ...

    def on_step_failed(self, request_ids: Sequence[str], message: str) -> None: ...

    def on_death(self, error: CoreDiedError) -> None:
        self._died.set()
