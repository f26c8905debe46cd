"""Replicas of a run as their own process sees them: what they tell, how they end, and interrupts."""

from collections import deque
from typing import Any

import pytest

from sarathi.benchmark.replicas.base import Replica, ReplicaError, run_together
from sarathi.benchmark.run.outcome import COMPLETED, DIED, INTERRUPTED, RunOutcome
from sarathi.benchmark.run.processes import Terminated
from sarathi.benchmark.workload.spec import RequestSpec

PLANNED = ((0, RequestSpec(0.0, 5, 2)), (2, RequestSpec(0.0, 5, 2)))


def outcome(ended: str = COMPLETED) -> RunOutcome:
    return RunOutcome(ended, 1.0, 2, {}, [], None, PLANNED)


class FakeReplica(Replica):
    """Tells what it is given; an exception is raised."""

    def __init__(self, number: int, *told: Any) -> None:
        super().__init__(number)
        self._told = deque(told)
        self.began, self.interrupts = False, 0

    def begin(self) -> None:
        self.began = True

    def interrupt(self, reason: KeyboardInterrupt) -> None:
        self.interrupts += 1

    def end(self) -> None:
        pass

    def _receive(self) -> Any:
        told = self._told.popleft()
        if isinstance(told, BaseException):
            raise told
        return told


def test_a_replica_without_requests_is_waited_for_once() -> None:
    replicas = [FakeReplica(0, PLANNED, outcome()), FakeReplica(1, (), outcome())]
    assert run_together(replicas) == [outcome(), outcome()]
    assert all(each.began for each in replicas)


def test_requests_of_a_replica_that_dies_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    replicas = [FakeReplica(0, PLANNED, outcome()), FakeReplica(1, PLANNED, ReplicaError("replica 1 died: killed"))]
    first, second = run_together(replicas)
    assert first == outcome() and (second.ended, second.requests) == (DIED, PLANNED)
    assert capsys.readouterr().err == "benchmark: replica 1 died: killed; 2 requests are lost\n"


def test_where_one_dies_before_the_start_none_starts() -> None:
    replicas = [FakeReplica(0, PLANNED), FakeReplica(1, ReplicaError("replica 1 failed: no such model"))]
    with pytest.raises(ReplicaError, match="replica 1 failed: no such model"):
        run_together(replicas)
    assert not any(each.began for each in replicas)


def test_where_all_die_there_is_no_result() -> None:
    replicas = [FakeReplica(number, PLANNED, ReplicaError("killed")) for number in range(2)]
    with pytest.raises(ReplicaError, match="every replica ended without a result"):
        run_together(replicas)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Terminated])
def test_an_interrupt_reaches_all_and_their_results_count(interrupt: type[KeyboardInterrupt]) -> None:
    replicas = [
        FakeReplica(0, PLANNED, interrupt(), outcome(INTERRUPTED)),
        FakeReplica(1, PLANNED, outcome(INTERRUPTED)),
    ]
    assert [each.ended for each in run_together(replicas)] == [INTERRUPTED, INTERRUPTED]
    assert [each.interrupts for each in replicas] == [1, 1]


def test_an_interrupt_before_the_start_has_no_result() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_together([FakeReplica(0, KeyboardInterrupt(), ReplicaError("ended"))])
