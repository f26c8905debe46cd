"""A front end's link to a core process: sends commands, dispatches reports, detects the core's death. No torch."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol

import zmq
import zmq.asyncio

from sarathi.engine.core_process import wire
from sarathi.messages import CoreOutput, CoreStats, EngineFacts, NewRequest

logger = logging.getLogger(__name__)
_CLOSED = "the link to the core process is closed"


class CoreDiedError(RuntimeError):
    """The core process has ended, or its heartbeats have stopped. It is not restarted."""


class CoreListener(Protocol):
    """Receives a link's reports, on the event loop."""

    def on_outputs(self, output: CoreOutput) -> None: ...

    def on_refused(self, request_ids: Sequence[str], message: str) -> None:
        """These requests were not queued."""

    def on_step_failed(self, request_ids: Sequence[str], message: str) -> None:
        """These requests have ended without another update."""

    def on_death(self, error: CoreDiedError) -> None:
        """Called at most once, and never after `close`."""


class CoreLink(ABC):
    """Belongs to one event loop.

    name: unique among all front ends that the core ever has. facts: reported by the core after its start.
    reports: ZeroMQ type of the socket on which this front end receives reports.
    """

    def __init__(self, name: str, reports: int) -> None:
        self.name = name
        self.facts: EngineFacts
        self.error: CoreDiedError | None = None
        self._context = zmq.asyncio.Context()
        self._commands = zmq.Socket(self._context, zmq.PUSH)  # its queue is unbounded: sending never blocks
        self._reports = self._context.socket(reports)
        for socket in (self._commands, self._reports):
            socket.set_hwm(0)
        self._listener: CoreListener | None = None
        self._got_report = False
        self._pending_stats: asyncio.Future[CoreStats] | None = None
        self._pending_changes: deque[asyncio.Future[wire.Done]] = deque()
        self._tasks: list[asyncio.Task[None]] = []

    @abstractmethod
    def kill(self) -> None:
        """Kill the core process if this process started it."""

    @abstractmethod
    async def close(self) -> None:
        """Close the link. Idempotent."""

    @abstractmethod
    def _watch(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Background tasks that detect the core's death and then call `_fail`."""

    def listen(self, listener: CoreListener) -> None:
        """Pass all reports from now on to `listener`."""
        self._listener = listener
        self._tasks = [asyncio.create_task(each) for each in (self._read(), *self._watch())]

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        """Queue requests, all or none. Raises ValueError for parameters that cannot be serialized."""
        try:
            self._send(wire.AddRequests(tuple(requests)))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"the request cannot be serialized for the core process: {error}") from None

    def finish(self, request_ids: Sequence[str], reason: str, stop_reason: str | None = None) -> None:
        """End requests, as `CoreClient.finish` does."""
        self._send(wire.Finish(tuple(request_ids), reason, stop_reason))

    async def stats(self) -> CoreStats:
        """Queue lengths and memory between two steps. Raises CoreDiedError, also after `close`."""
        self._check_open()
        if self._pending_stats is None:
            self._pending_stats = asyncio.get_running_loop().create_future()
            self._send(wire.GetStats())
        return await asyncio.shield(self._pending_stats)

    async def change_memory(self, command: wire.MemoryChange) -> None:
        """Return once the change is done. Raises ValueError if it is rejected, CoreDiedError."""
        self._check_open()
        done = asyncio.get_running_loop().create_future()
        self._pending_changes.append(done)
        self._send(command)
        report: wire.Done = await asyncio.shield(done)
        if report.error is not None:
            raise ValueError(report.error)

    def _check_open(self) -> None:
        if self.error is not None:
            raise self.error
        if self._commands.closed:
            raise CoreDiedError(_CLOSED)

    def _send(self, command: wire.Command) -> None:
        if self._commands.closed:
            return
        with suppress(zmq.Again):  # the core has ended; `_watch` reports it
            self._commands.send_multipart((self.name.encode(), wire.encode(command)), zmq.NOBLOCK)

    async def _read(self) -> None:
        try:
            while True:
                self._dispatch(wire.decode_report(await self._reports.recv()))
        except Exception as error:
            logger.exception("a report of the core process could not be processed")
            self._fail(f"a report of the core process could not be processed: {type(error).__name__}: {error}")

    def _dispatch(self, report: wire.Report) -> None:
        self._got_report = True
        assert self._listener is not None
        if isinstance(report, wire.StepOutputs):
            output = CoreOutput(report.updates, None, report.first_scheduled, report.scheduled_at_s)
            self._listener.on_outputs(output)
        elif isinstance(report, wire.Refused):
            self._listener.on_refused(report.request_ids, report.message)
        elif isinstance(report, wire.StepFailed):
            self._listener.on_step_failed(report.request_ids, report.message)
        elif isinstance(report, wire.Stats) and self._pending_stats is not None:
            waiting, self._pending_stats = self._pending_stats, None
            waiting.set_result(report.core)
        elif isinstance(report, wire.Done):
            self._pending_changes.popleft().set_result(report)

    def _fail(self, message: str) -> None:
        if self.error is not None:
            return
        self.error = CoreDiedError(message)
        logger.error(message)
        self.kill()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._fail_pending(self.error)
        self._release()
        assert self._listener is not None
        self._listener.on_death(self.error)

    def _stop(self) -> None:
        """Stop reading and fail pending calls."""
        for task in self._tasks:
            task.cancel()
        self._fail_pending(CoreDiedError(_CLOSED))

    def _fail_pending(self, error: CoreDiedError) -> None:
        waiting: list[asyncio.Future[Any]] = [
            *self._pending_changes,
            *([] if self._pending_stats is None else [self._pending_stats]),
        ]
        for each in waiting:
            each.set_exception(error)
            each.exception()  # marks it as retrieved: its caller may have gone
        self._pending_changes.clear()
        self._pending_stats = None

    def _release(self) -> None:
        self._commands.close(linger=0)
        self._reports.close(linger=0)
        self._context.destroy(linger=0)
