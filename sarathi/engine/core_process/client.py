"""The parent's handle of a core process: starts it, connects to it and ends it. Does not import torch."""

import asyncio
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from sarathi.engine.core_process import wire
from sarathi.engine.core_process.link import CoreLink
from sarathi.engine.core_process.owners import MAIN
from sarathi.engine.core_process.process import COMMANDS, REPORTS, MakeCore

logger = logging.getLogger(__name__)
_RUN = "from sarathi.engine.core_process.process import main; main()"
_EXIT_TIMEOUT_S = 10.0  # from the shutdown command to the exit
_START_TIMEOUT_S = 60.0  # between heartbeats during start: loading a library can block every thread


class CoreStartError(RuntimeError):
    """The core process could not build its core."""


class CoreProcess(CoreLink):
    """A running core process and the link of its parent to it.

    folder: contains the sockets; removed when the core ends.
    """

    def __init__(self, process: Process, folder: Path, heartbeat_timeout_s: float) -> None:
        super().__init__(MAIN, zmq.PULL)
        self.folder = folder
        self._process = process
        self._heartbeat_timeout_s = heartbeat_timeout_s
        for socket, name in ((self._commands, COMMANDS), (self._reports, REPORTS)):
            socket.bind(f"ipc://{folder / name}")

    @classmethod
    async def start(
        cls, make_core: MakeCore, heartbeat_timeout_s: float = 10.0, pass_fds: Sequence[int] = ()
    ) -> "CoreProcess":
        """Start a process and return once its core is built.

        make_core: must be picklable. heartbeat_timeout_s: time without heartbeats after which the core counts as dead.
        pass_fds: file descriptors that the process inherits.
        Raises ValueError for a user error in make_core, else CoreStartError.
        """
        folder = Path(tempfile.mkdtemp(prefix="sarathi-"))
        try:
            core = cls(await _spawn(folder, pass_fds), folder, heartbeat_timeout_s)
        except BaseException:
            shutil.rmtree(folder)
            raise
        try:
            await core._wait_until_started(pickle.dumps(make_core))
        except BaseException:
            await core._kill_and_wait()
            raise
        return core

    def leave(self, name: str) -> None:
        """Report that another front end has gone; the core ends its requests."""
        self._send(wire.Leave(name))

    async def close(self) -> None:
        """Ask the process to exit, and kill it after a timeout. Idempotent."""
        self._stop()
        self._send(wire.Shutdown())
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_TIMEOUT_S)
        except asyncio.TimeoutError:
            logger.warning("the core process did not exit within %g s and is killed", _EXIT_TIMEOUT_S)
        finally:
            await self._kill_and_wait()

    def _watch(self) -> Sequence[Coroutine[Any, Any, None]]:
        return self._watch_exit(), self._watch_heartbeat()

    def kill(self) -> None:
        """Kill the process and its descendants (ranks)."""
        if self._process.returncode is None:
            descendants = _descendants(self._process.pid)
            self._process.kill()
            for pid in descendants:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def _kill_and_wait(self) -> None:
        self.kill()
        try:
            await self._process.wait()
        finally:
            self._release()

    async def _wait_until_started(self, make_core: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(make_core)
        self._process.stdin.close()
        report = await self._first_report()
        if isinstance(report, wire.StartFailed):
            await self._process.wait()
            raise ValueError(report.message) if report.is_user_error else CoreStartError(report.message)
        assert isinstance(report, wire.Started)
        self.facts = report.facts

    async def _first_report(self) -> wire.Report:
        """The first report that is not a heartbeat."""
        exit_code = asyncio.create_task(self._process.wait())
        try:
            while True:
                report = await self._startup_report(exit_code)
                if not isinstance(report, wire.Heartbeat):
                    return report
        finally:
            exit_code.cancel()

    async def _startup_report(self, exit_code: "asyncio.Task[int]") -> wire.Report:
        message = asyncio.ensure_future(self._reports.recv())
        try:
            await asyncio.wait({message, exit_code}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return wire.decode_report(message.result())
        finally:
            message.cancel()
        if exit_code.done():
            raise CoreStartError(f"the core process ended with exit code {exit_code.result()} during its start")
        raise CoreStartError(f"the core process sent no heartbeat for {_START_TIMEOUT_S:g} s during its start")

    async def _watch_exit(self) -> None:
        self._fail(f"the core process ended with exit code {await self._process.wait()}")

    async def _watch_heartbeat(self) -> None:
        """Checks for new reports, not for their times: a pause of this process must not look like a dead core."""
        interval_s = min(1.0, self._heartbeat_timeout_s / 2)
        silence_s = 0.0
        while silence_s < self._heartbeat_timeout_s:
            await asyncio.sleep(interval_s)
            silence_s = 0.0 if self._got_report else silence_s + interval_s
            self._got_report = False
        self._fail(f"the core process sent no heartbeat for {silence_s:g} s")

    def _release(self) -> None:
        super()._release()
        shutil.rmtree(self.folder, ignore_errors=True)


def _descendants(pid: int) -> list[int]:
    """Process ids of all descendants of a process."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children = [int(child) for child in path.read_text().split()]
            found += children + [descendant for child in children for descendant in _descendants(child)]
    return found


async def _spawn(folder: Path, pass_fds: Sequence[int]) -> Process:
    """Starts a new session, so that the terminal's Ctrl-C does not reach the process."""
    command = (sys.executable, "-c", _RUN, str(folder), str(os.getpid()))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, env=env, start_new_session=True, pass_fds=pass_fds
    )
