"""The client of a core process: starts it, sends commands, passes its reports on, notices its death. Needs no torch."""

import asyncio
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import zmq
import zmq.asyncio

from sarathi.engine.core_process import wire
from sarathi.engine.core_process.process import COMMANDS, REPORTS, MakeCore
from sarathi.messages import CoreOutput, EngineFacts, NewRequest

logger = logging.getLogger(__name__)
_CLOSED = "the core process was asked to end"
_RUN = "from sarathi.engine.core_process.process import main; main()"
_EXIT_S = 10.0  # for a core to end after it was asked to
_START_SILENCE_S = 60.0  # without a sign of life while libraries are loaded, which may stop all threads of a process


class CoreStartError(RuntimeError):
    """The core process could not make its core."""


class CoreDiedError(RuntimeError):
    """The core process has ended, or gave no sign of life for too long. It is not started again."""


class CoreListener(Protocol):
    """Whom a client passes reports to, on the event loop."""

    def on_outputs(self, output: CoreOutput) -> None: ...

    def on_refused(self, request_ids: Sequence[str], message: str) -> None:
        """These requests were not queued."""

    def on_step_failed(self, request_ids: Sequence[str], message: str) -> None:
        """These requests have ended without another update."""

    def on_death(self, error: CoreDiedError) -> None:
        """Called once, and not after `close`."""


class CoreProcess:
    """A running core process; belongs to the event loop that started it.

    facts: what the core told when it had started.
    """

    def __init__(self, process: Process, folder: Path, heartbeat_timeout_s: float) -> None:
        self.facts: EngineFacts
        self.error: CoreDiedError | None = None
        self._process = process
        self._folder = folder
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._context = zmq.asyncio.Context()
        self._commands = zmq.Socket(self._context, zmq.PUSH)  # with an unbounded queue, sending never waits
        self._reports = self._context.socket(zmq.PULL)
        for socket, name in ((self._commands, COMMANDS), (self._reports, REPORTS)):
            socket.set_hwm(0)
            socket.bind(f"ipc://{folder / name}")
        self._listener: CoreListener | None = None
        self._has_beaten = False
        self._stats: asyncio.Future[wire.CoreStats] | None = None
        self._changes: deque[asyncio.Future[wire.Done]] = deque()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, make_core: MakeCore, heartbeat_timeout_s: float = 10.0) -> "CoreProcess":
        """Start a process, and return when its core is made.

        make_core: a function that pickle can send. heartbeat_timeout_s: silence after which the core counts as dead.
        Raises what make_core raised as ValueError where it is the user's, else CoreStartError.
        """
        folder = Path(tempfile.mkdtemp(prefix="sarathi-"))
        try:
            core = cls(await _spawn(folder), folder, heartbeat_timeout_s)
        except BaseException:
            shutil.rmtree(folder)
            raise
        try:
            await core._wait_until_started(pickle.dumps(make_core))
        except BaseException:
            await core._end_at_once()
            raise
        return core

    def listen(self, listener: CoreListener) -> None:
        """Pass all reports from now on to `listener`."""
        self._listener = listener
        running = (self._read(), self._watch_exit(), self._watch_heartbeat())
        self._tasks = [asyncio.create_task(each) for each in running]

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        """Queue requests, all or none. Raises ValueError where their parameters cannot go to another process."""
        try:
            self._send(wire.AddRequests(tuple(requests)))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"the request holds what cannot be sent to the core process: {error}") from None

    def finish(self, request_ids: Sequence[str], reason: str, stop_reason: str | None = None) -> None:
        """End requests, as `CoreClient.finish` does."""
        self._send(wire.Finish(tuple(request_ids), reason, stop_reason))

    async def stats(self) -> wire.CoreStats:
        """Queues and memory between two steps. Raises CoreDiedError, also after `close`."""
        if self.error is not None:
            raise self.error
        if self._commands.closed:
            raise CoreDiedError(_CLOSED)
        if self._stats is None:
            self._stats = asyncio.get_running_loop().create_future()
            self._send(wire.GetStats())
        return await asyncio.shield(self._stats)

    async def change_memory(self, command: "wire.SetCacheBudget | wire.Sleep | wire.WakeUp") -> None:
        """Return when it is done. Raises ValueError where it is refused, CoreDiedError."""
        if self.error is not None:
            raise self.error
        if self._commands.closed:
            raise CoreDiedError(_CLOSED)
        done = asyncio.get_running_loop().create_future()
        self._changes.append(done)
        self._send(command)
        report: wire.Done = await asyncio.shield(done)
        if report.error is not None:
            raise ValueError(report.error)

    async def close(self) -> None:
        """End the process: it is asked to, and killed where it does not obey. May be called again."""
        for task in self._tasks:
            task.cancel()
        self._fail_answers(CoreDiedError(_CLOSED))
        self._send(wire.Shutdown())
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_S)
        except asyncio.TimeoutError:
            logger.warning("the core process did not end within %g s: it is killed", _EXIT_S)
        finally:
            await self._end_at_once()

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

    def _send(self, command: wire.Command) -> None:
        if not self._commands.closed:
            self._commands.send(wire.encode(command), zmq.NOBLOCK)

    async def _read(self) -> None:
        try:
            while True:
                self._take(wire.decode_report(await self._reports.recv()))
        except Exception as error:
            logger.exception("a report of the core process could not be processed")
            self._die(f"a report of the core process could not be processed: {type(error).__name__}: {error}")

    def _take(self, report: wire.Report) -> None:
        self._has_beaten = True
        assert self._listener is not None
        if isinstance(report, wire.StepOutputs):
            output = CoreOutput(report.updates, None, report.first_scheduled, report.scheduled_at_s)
            self._listener.on_outputs(output)
        elif isinstance(report, wire.Refused):
            self._listener.on_refused(report.request_ids, report.message)
        elif isinstance(report, wire.StepFailed):
            self._listener.on_step_failed(report.request_ids, report.message)
        elif isinstance(report, wire.CoreStats) and self._stats is not None:
            waiting, self._stats = self._stats, None
            waiting.set_result(report)
        elif isinstance(report, wire.Done):
            self._changes.popleft().set_result(report)

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

    def _die(self, message: str) -> None:
        if self.error is not None:
            return
        self.error = CoreDiedError(message)
        logger.error(message)
        self.kill()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._fail_answers(self.error)
        self._release()
        assert self._listener is not None
        self._listener.on_death(self.error)

    def _fail_answers(self, error: CoreDiedError) -> None:
        waiting: list[asyncio.Future[Any]] = [*self._changes, *([] if self._stats is None else [self._stats])]
        for each in waiting:
            each.set_exception(error)
            each.exception()  # its callers may have gone
        self._changes.clear()
        self._stats = None

    def _release(self) -> None:
        self._commands.close(linger=0)
        self._reports.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)


def _descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, and of theirs."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children = [int(child) for child in path.read_text().split()]
            found += children + [below for child in children for below in _descendants(child)]
    return found


async def _spawn(folder: Path) -> Process:
    """A session of its own keeps Ctrl-C of the terminal from it."""
    words = (sys.executable, "-c", _RUN, str(folder), str(os.getpid()))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return await asyncio.create_subprocess_exec(*words, stdin=PIPE, env=env, start_new_session=True)
