"""The main loop of a core process: receives commands, runs a step, sends its outputs; blocks while there is no work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from sarathi.engine.core_process.owners import MAIN, Owners
from sarathi.engine.core_process.wire import (
    AddRequests,
    Command,
    Done,
    Finish,
    GetStats,
    Join,
    Leave,
    MemoryChange,
    Report,
    SetCacheBudget,
    Shutdown,
    Sleep,
    Started,
    Stats,
    WakeUp,
)

if TYPE_CHECKING:
    from sarathi.engine.core import EngineCore

logger = logging.getLogger(__name__)
_MAX_FAILED_STEPS = 3


class Channel(Protocol):
    """Receives commands and sends reports. Each client has a name; the process that started the core is MAIN."""

    def receive(self, timeout_s: float | None) -> Sequence[tuple[str, Command]]:
        """All queued commands in order, with their senders' names. timeout_s: for the first one; None: no limit."""

    def send(self, report: Report, name: str = MAIN) -> None: ...


class CoreLoop:
    """Serves a core's clients. A failed step ends all requests; the loop continues unless later steps must fail too."""

    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self._core = core
        self._channel = channel
        self._owners = Owners(channel.send)
        self._num_failed = 0  # steps in a row

    def run(self) -> None:
        """Run until Shutdown. Re-raises a step's error if the device is lost or three steps in a row failed."""
        self._channel.send(Started(self._core.facts))
        while True:
            for name, command in self._channel.receive(self._poll_timeout_s()):
                if isinstance(command, Shutdown):
                    return
                if not self._owners.is_gone(name):
                    self._execute(command, name)
            self._core.balance()
            if self._core.has_work:
                self._step()
            else:
                self._core.check_health()

    def _poll_timeout_s(self) -> float | None:
        """0 while a step can compute anything; None: no limit."""
        core = self._core
        if not core.has_work:
            return core.idle_poll_interval_s
        return (core.poll_interval_s if core.is_starved else None) or 0.0

    def _execute(self, command: Command, name: str) -> None:
        if isinstance(command, AddRequests):
            self._add(command, name)
        elif isinstance(command, Finish):
            self._finish(command.request_ids, command.reason, command.stop_reason)
        elif isinstance(command, GetStats):
            self._channel.send(Stats(self._core.stats()), name)
        elif isinstance(command, MemoryChange):
            self._channel.send(self._change_memory(command), name)
        elif isinstance(command, Join):
            self._channel.send(Started(self._core.facts), name)
        elif isinstance(command, Leave):
            self._finish(self._owners.leave(command.name), "abort")

    def _finish(self, request_ids: Sequence[str], reason: str, stop_reason: str | None = None) -> None:
        for request_id in request_ids:
            self._core.finish(request_id, reason, stop_reason)
        self._owners.forget(request_ids)

    def _change_memory(self, command: MemoryChange) -> Done:
        try:
            if isinstance(command, SetCacheBudget):
                self._core.set_cache_budget(command.memory_bytes)
            elif isinstance(command, Sleep):
                self._core.sleep(command.level)
            elif isinstance(command, WakeUp):
                self._core.wake_up()
            elif not self._core.reset_prefix_cache():
                return Done("a request is unfinished: the prefix cache can be reset only without requests")
        except ValueError as error:
            return Done(str(error))
        return Done()

    def _add(self, command: AddRequests, name: str) -> None:
        request_ids = tuple([request.request_id for request in command.requests])
        self._owners.add(name, request_ids)
        try:
            self._core.add_requests(command.requests)
        except ValueError as error:
            for request_id in request_ids:
                self._core.finish(request_id, "error")
            self._owners.send_refused(name, request_ids, str(error))

    def _step(self) -> None:
        try:
            output = self._core.step()
        except Exception as error:
            self._recover(error)
            return
        if output.step is not None:
            self._num_failed = 0
        if output.updates or output.first_scheduled:
            self._owners.send_outputs(output)

    def _recover(self, error: Exception) -> None:
        """End every request; re-raise the error if no later step can succeed."""
        logger.exception("a step failed: all requests end with an error")
        request_ids = self._core.scheduler.request_ids
        self._core.reset()
        self._owners.send_failed(request_ids, f"{type(error).__name__}: {error}")
        self._num_failed += 1
        if self._num_failed >= _MAX_FAILED_STEPS:
            raise error
        self._core.executor.wait()  # raises where the device is lost
