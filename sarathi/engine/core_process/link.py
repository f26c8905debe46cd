"""The link of a front end to a core process: sends commands, passes reports on, notices the core's death. No torch."""

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
_CLOSED = "the core process was asked to end"


class CoreDiedError(RuntimeError):
    """The core process has ended, or gave no sign of life for too long. It is not started again."""


class CoreListener(Protocol):
    """Whom a link passes reports to, on the event loop."""

    def on_outputs(self, output: CoreOutput) -> None: ...

    def on_refused(self, request_ids: Sequence[str], message: str) -> None:
        """These requests were not queued."""

    def on_step_failed(self, request_ids: Sequence[str], message: str) -> None:
        """These requests have ended without another update."""

    def on_death(self, error: CoreDiedError) -> None:
        """Called once, and not after `close`."""


class CoreLink(ABC):
    """A link that belongs to one event loop.

    name: unique among the front ends of a core, and in its whole life. facts: what the core told when it had started.
    reports: what the core sends to this front end comes from this kind of socket.
    """

    def __init__(self, name: str, reports: int) -> None:
        self.name = name
        self.facts: EngineFacts
        self.error: CoreDiedError | None = None
        self._context = zmq.asyncio.Context()
        self._commands = zmq.Socket(self._context, zmq.PUSH)  # with an unbounded queue, sending never waits
        self._reports = self._context.socket(reports)
        for socket in (self._commands, self._reports):
            socket.set_hwm(0)
        self._listener: CoreListener | None = None
        self._has_beaten = False
        self._stats: asyncio.Future[CoreStats] | None = None
        self._changes: deque[asyncio.Future[wire.Done]] = deque()
        self._tasks: list[asyncio.Task[None]] = []

    @abstractmethod
    def kill(self) -> None:
        """End what runs at the other end, where this process may."""

    @abstractmethod
    async def close(self) -> None:
        """End the link. May be called again."""

    @abstractmethod
    def _watch(self) -> Sequence[Coroutine[Any, Any, None]]:
        """What runs beside the reading of reports, and calls `_die`."""

    def listen(self, listener: CoreListener) -> None:
        """Pass all reports from now on to `listener`."""
        self._listener = listener
        self._tasks = [asyncio.create_task(each) for each in (self._read(), *self._watch())]

    def add_requests(self, requests: Sequence[NewRequest]) -> None:
        """Queue requests, all or none. Raises ValueError where their parameters cannot go to another process."""
        try:
            self._send(wire.AddRequests(tuple(requests)))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"the request holds what cannot be sent to the core process: {error}") from None

    def finish(self, request_ids: Sequence[str], reason: str, stop_reason: str | None = None) -> None:
        """End requests, as `CoreClient.finish` does."""
        self._send(wire.Finish(tuple(request_ids), reason, stop_reason))

    async def stats(self) -> CoreStats:
        """Queues and memory between two steps. Raises CoreDiedError, also after `close`."""
        self._check_open()
        if self._stats is None:
            self._stats = asyncio.get_running_loop().create_future()
            self._send(wire.GetStats())
        return await asyncio.shield(self._stats)

    async def change_memory(self, command: wire.MemoryChange) -> None:
        """Return when it is done. Raises ValueError where it is refused, CoreDiedError."""
        self._check_open()
        done = asyncio.get_running_loop().create_future()
        self._changes.append(done)
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
        with suppress(zmq.Again):  # nobody is there any more, which is told soon
            self._commands.send_multipart((self.name.encode(), wire.encode(command)), zmq.NOBLOCK)

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
        elif isinstance(report, wire.Stats) and self._stats is not None:
            waiting, self._stats = self._stats, None
            waiting.set_result(report.core)
        elif isinstance(report, wire.Done):
            self._changes.popleft().set_result(report)

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

    def _stop(self) -> None:
        """Read no more, and fail what waits for an answer."""
        for task in self._tasks:
            task.cancel()
        self._fail_answers(CoreDiedError(_CLOSED))

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
