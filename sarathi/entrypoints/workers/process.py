"""An API process as its supervisor sees it."""

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
    """A process that was started; it ends when it is asked to, fails, or is silent for too long."""

    def __init__(self, process: Process, name: str) -> None:
        self.name = name
        self.is_ready = False
        self._process = process

    @classmethod
    async def start(cls, setup: WorkerSetup) -> "WorkerProcess":
        """Return at once. A session of its own keeps Ctrl-C of the terminal from it."""
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
        """Whether it takes connections; False where it ended instead."""
        assert self._process.stdout is not None
        self.is_ready = READY in await self._process.stdout.read(1)
        return self.is_ready

    async def wait(self, silence_s: float) -> int:
        """Its exit code. It is killed when it gives no sign of life for so long."""
        assert self._process.stdout is not None
        with suppress(asyncio.TimeoutError):
            while await asyncio.wait_for(self._process.stdout.read(_READ_BYTES), silence_s):
                pass
        return await self._ended()

    def terminate(self) -> None:
        """Ask it to drain."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _ended(self) -> int:
        """At the end of its output it has closed it or was silent: either way it goes."""
        try:
            return await asyncio.wait_for(self._process.wait(), 1.0)
        except asyncio.TimeoutError:
            self.kill()
            return await self._process.wait()
