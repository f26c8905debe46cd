"""The supervisor's handle of an API process."""

import asyncio
import os
import pickle
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress

from sarathi.entrypoints.workers.setup import READY, WorkerSetup

_RUN = "from sarathi.entrypoints.workers.worker import main; main()"
_METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported
_READ_BYTES = 4096


class WorkerProcess:
    """A started process; it ends on request, on failure, or is killed when its heartbeats stop."""

    def __init__(self, process: Process, name: str) -> None:
        self.name = name
        self.is_ready = False
        self._process = process

    @classmethod
    async def start(cls, setup: WorkerSetup) -> "WorkerProcess":
        """Returns at once. The process gets its own session, so Ctrl-C in the terminal does not reach it."""
        env = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            _METRICS_VARIABLE: str(setup.metrics_folder),
        }  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _RUN, stdin=PIPE, stdout=PIPE, env=env, start_new_session=True,
            pass_fds=[setup.core_life],
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(setup))
        return cls(process, setup.name)

    async def wait_until_ready(self) -> bool:
        """True once it accepts connections; False if it ended before."""
        assert self._process.stdout is not None
        self.is_ready = READY in await self._process.stdout.read(1)
        return self.is_ready

    async def wait(self, silence_s: float) -> int:
        """Its exit code. Kills it if no heartbeat arrives for silence_s."""
        assert self._process.stdout is not None
        with suppress(asyncio.TimeoutError):
            while await asyncio.wait_for(self._process.stdout.read(_READ_BYTES), silence_s):
                pass
        return await self._ended()

    def terminate(self) -> None:
        """Make it drain."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _ended(self) -> int:
        """Its exit code. Kills it unless it ends by itself within a second."""
        try:
            return await asyncio.wait_for(self._process.wait(), 1.0)
        except asyncio.TimeoutError:
            self.kill()
            return await self._process.wait()
