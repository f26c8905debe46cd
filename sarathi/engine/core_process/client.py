"""The core process as its parent sees it: starts it, links to it, ends it. Needs no torch."""

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
_EXIT_S = 10.0  # for a core to end after it was asked to
_START_SILENCE_S = 60.0  # without a sign of life while libraries are loaded, which may stop all threads of a process


class CoreStartError(RuntimeError):
    """The core process could not make its core."""


class CoreProcess(CoreLink):
    """A running core process, and the link of the process that started it.

    folder: of the sockets, which is this core's own and goes with it.
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
        """Start a process, and return when its core is made.

        make_core: a function that pickle can send. heartbeat_timeout_s: silence after which the core counts as dead.
        pass_fds: files that it has open as long as it lives.
        Raises what make_core raised as ValueError where it is the user's, else CoreStartError.
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
            await core._end_at_once()
            raise
        return core

    def leave(self, name: str) -> None:
        """Say that another front end is gone: its requests end."""
        self._send(wire.Leave(name))

    async def close(self) -> None:
        """End the process: it is asked to, and killed where it does not obey. May be called again."""
        self._stop()
        self._send(wire.Shutdown())
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_S)
        except asyncio.TimeoutError:
            logger.warning("the core process did not end within %g s: it is killed", _EXIT_S)
        finally:
            await self._end_at_once()

    def _watch(self) -> Sequence[Coroutine[Any, Any, None]]:
        return self._watch_exit(), self._watch_heartbeat()

    def kill(self) -> None:
        """End the process and its own, as the ranks, at once; their memory is the system's again."""
        if self._process.returncode is None:
            descendants = _descendants(self._process.pid)
            self._process.kill()
            for pid in descendants:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def _end_at_once(self) -> None:
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
        """The first one that is no heartbeat."""
        exit_code = asyncio.create_task(self._process.wait())
        try:
            while True:
                report = await self._report_of_start(exit_code)
                if not isinstance(report, wire.Heartbeat):
                    return report
        finally:
            exit_code.cancel()

    async def _report_of_start(self, exit_code: "asyncio.Task[int]") -> wire.Report:
        message = asyncio.ensure_future(self._reports.recv())
        try:
            await asyncio.wait({message, exit_code}, timeout=_START_SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return wire.decode_report(message.result())
        finally:
            message.cancel()
        if exit_code.done():
            raise CoreStartError(f"the core process ended with exit code {exit_code.result()} while it started")
        raise CoreStartError(f"the core process gave no sign of life for {_START_SILENCE_S:g} s while it started")

    async def _watch_exit(self) -> None:
        self._die(f"the core process ended with exit code {await self._process.wait()}")

    async def _watch_heartbeat(self) -> None:
        """Beats are counted, not timed: where this process itself stood still, all beats of that time are unread."""
        interval_s = min(1.0, self._heartbeat_timeout_s / 2)
        silence_s = 0.0
        while silence_s < self._heartbeat_timeout_s:
            await asyncio.sleep(interval_s)
            silence_s = 0.0 if self._has_beaten else silence_s + interval_s
            self._has_beaten = False
        self._die(f"the core process gave no sign of life for {silence_s:g} s")

    def _release(self) -> None:
        super()._release()
        shutil.rmtree(self.folder, ignore_errors=True)


def _descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, and of theirs."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children = [int(child) for child in path.read_text().split()]
            found += children + [below for child in children for below in _descendants(child)]
    return found


async def _spawn(folder: Path, pass_fds: Sequence[int]) -> Process:
    """A session of its own keeps Ctrl-C of the terminal from it."""
    words = (sys.executable, "-c", _RUN, str(folder), str(os.getpid()))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return await asyncio.create_subprocess_exec(*words, stdin=PIPE, env=env, start_new_session=True, pass_fds=pass_fds)
