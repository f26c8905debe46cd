"""Interface of a replica, and a run on several of them."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from sarathi.benchmark.run.outcome import DIED, Planned, RunOutcome

_POLL_S = 0.1


class ReplicaError(RuntimeError):
    """A replica ended without a result; its error message is on stderr."""


class Replica(ABC):
    """An engine that serves its share of the requests. Call `plan`, `begin` and `outcome` in this order."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._planned: Planned | None = None
        self._outcome: RunOutcome | None = None

    def plan(self) -> None:
        """Wait until its engine is warmed up. Raises ReplicaError. May be called again."""
        if self._planned is None:
            self._planned = self._receive()

    @abstractmethod
    def begin(self) -> None:
        """Start serving; does not block."""

    def outcome(self) -> RunOutcome:
        """Wait for its result. If it dies after the start, its requests are lost. May be called again."""
        self.plan()
        if self._outcome is None:
            self._outcome = self._result()
        return self._outcome

    @abstractmethod
    def interrupt(self) -> None:
        """End its run with partial results, after ^C or a signal to this process."""

    @abstractmethod
    def is_ready(self, timeout_s: float) -> bool:
        """Whether it has told something that was not received yet, or has ended. Waits for that up to `timeout_s`."""

    @abstractmethod
    def end(self) -> None:
        """Terminate it and release its resources, in any state."""

    @abstractmethod
    def _receive(self) -> Any:
        """Receive its next message: first its requests, then its outcome. ReplicaError if it died."""

    def _result(self) -> RunOutcome:
        try:
            outcome: RunOutcome = self._receive()
        except ReplicaError as error:
            print(f"benchmark: {error}; {len(self._planned or ())} requests are lost", file=sys.stderr)
            return RunOutcome(DIED, 0.0, 0, {}, [], None, self._planned or ())
        return outcome


def plan_together(replicas: Sequence[Replica], stop: threading.Event) -> None:
    """Wait until all engines are warm. ReplicaError where one died. An interrupt sets `stop` and ends them."""
    try:
        for replica in replicas:
            replica.plan()
    except KeyboardInterrupt:
        stop.set()
        _wait(replicas, stop)
        raise


def run_together(replicas: Sequence[Replica], stop: threading.Event) -> list[RunOutcome]:
    """The outcomes of replicas that start at the same time. ReplicaError where all died.

    Where `stop` is set they end with what they have. KeyboardInterrupt if that is nothing.
    """
    for replica in replicas:
        replica.begin()
    _wait(replicas, stop)
    outcomes = [replica.outcome() for replica in replicas]
    if all(outcome.ended == DIED for outcome in outcomes):
        raise KeyboardInterrupt if stop.is_set() else ReplicaError("every replica ended without a result")
    return outcomes


def _wait(replicas: Sequence[Replica], stop: threading.Event) -> None:
    """Until all have told something or ended. Interrupts all of them, once, where `stop` is set."""
    running, to_interrupt = list(replicas), list(replicas)
    while running := [replica for replica in running if not replica.is_ready(_POLL_S)]:
        while stop.is_set() and to_interrupt:
            to_interrupt.pop().interrupt()
