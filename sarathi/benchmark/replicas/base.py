"""A replica as the process of the run sees it, wherever it is, and the outcomes of all of them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from sarathi.benchmark.run.outcome import DIED, Planned, RunOutcome


class ReplicaError(RuntimeError):
    """A replica ended without a result; its own message is on stderr."""


class Replica(ABC):
    """One engine that serves its share of the requests. `plan`, `begin` and `outcome` are called in this order."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._planned: Planned | None = None
        self._outcome: RunOutcome | None = None

    def plan(self) -> None:
        """Wait until its engine is warm. Raises ReplicaError. May be called again."""
        if self._planned is None:
            self._planned = self._receive()

    @abstractmethod
    def begin(self) -> None:
        """Have it start to serve. Returns at once."""

    def outcome(self) -> RunOutcome:
        """Wait for its result. Where it died after its start, its requests are lost. May be called again."""
        self.plan()
        if self._outcome is None:
            self._outcome = self._result()
        return self._outcome

    @abstractmethod
    def interrupt(self, reason: KeyboardInterrupt) -> None:
        """Have it end its run with what it has, after ^C or a signal to this process."""

    @abstractmethod
    def end(self) -> None:
        """Leave nothing of it behind, in whatever state it is."""

    @abstractmethod
    def _receive(self) -> Any:
        """The next of what it tells: its requests, then its outcome. Raises ReplicaError where it ended."""

    def _result(self) -> RunOutcome:
        try:
            outcome: RunOutcome = self._receive()
        except ReplicaError as error:
            print(f"benchmark: {error}; {len(self._planned or ())} requests are lost", file=sys.stderr)
            return RunOutcome(DIED, 0.0, 0, {}, [], None, self._planned or ())
        return outcome


def run_together(replicas: Sequence[Replica]) -> list[RunOutcome]:
    """The outcomes of replicas that start at the same time. ReplicaError where one died before the start, or all did.

    Waits through one interrupt, which replicas answer with what they have. KeyboardInterrupt if they have nothing.
    """
    try:
        for replica in replicas:
            replica.plan()
        for replica in replicas:
            replica.begin()
        outcomes = [replica.outcome() for replica in replicas]
    except KeyboardInterrupt as interrupt:
        for replica in replicas:
            replica.interrupt(interrupt)
        outcomes = _after_interrupt(replicas)
    if all(outcome.ended == DIED for outcome in outcomes):
        raise ReplicaError("every replica ended without a result")
    return outcomes


def _after_interrupt(replicas: Sequence[Replica]) -> list[RunOutcome]:
    try:
        outcomes = [replica.outcome() for replica in replicas]
    except ReplicaError:
        raise KeyboardInterrupt from None
    if any(outcome.ended == DIED for outcome in outcomes):
        raise KeyboardInterrupt
    return outcomes
