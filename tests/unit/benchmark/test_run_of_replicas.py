"""Replicas of a run as their own process sees them: what they tell, how they end, and interrupts."""

import json
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from sarathi.benchmark import main as main_module
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.main import EXIT_INTERRUPTED, run_configs
from sarathi.benchmark.replicas import process, run
from sarathi.benchmark.replicas.base import Replica, ReplicaError, plan_together, run_together
from sarathi.benchmark.run.outcome import COMPLETED, DIED, INTERRUPTED, RunOutcome
from sarathi.benchmark.run.processes import ENDING
from sarathi.benchmark.workload.spec import RequestSpec

PLANNED = ((0, RequestSpec(0.0, 5, 2)), (2, RequestSpec(0.0, 5, 2)))


def outcome(ended: str = COMPLETED) -> RunOutcome:
    return RunOutcome(ended, 1.0, 2, {}, [], None, PLANNED)


class FakeReplica(Replica):
    """Tells what it is given; an exception is raised."""

    def __init__(self, number: int, *told: Any, waits: bool = False) -> None:
        super().__init__(number)
        self._waits = waits
        self._told = deque(told)
        self.began, self.interrupts = False, 0

    def begin(self) -> None:
        self.began = True

    def interrupt(self) -> None:
        self.interrupts += 1

    def is_ready(self, timeout_s: float) -> bool:
        """Where it waits, it has something to tell after an interrupt alone."""
        return not self._waits or self.interrupts > 0

    def end(self) -> None:
        pass

    def _receive(self) -> Any:
        told = self._told.popleft()
        if isinstance(told, BaseException):
            raise told
        return told


def test_a_replica_without_requests_is_waited_for_once() -> None:
    replicas = [FakeReplica(0, PLANNED, outcome()), FakeReplica(1, (), outcome())]
    assert run_together(replicas, threading.Event()) == [outcome(), outcome()]
    assert all(each.began for each in replicas)


def test_requests_of_a_replica_that_dies_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    replicas = [FakeReplica(0, PLANNED, outcome()), FakeReplica(1, PLANNED, ReplicaError("replica 1 died: killed"))]
    first, second = run_together(replicas, threading.Event())
    assert first == outcome() and (second.ended, second.requests) == (DIED, PLANNED)
    assert capsys.readouterr().err == "benchmark: replica 1 died: killed; 2 requests are lost\n"


def test_where_one_dies_before_the_start_none_starts() -> None:
    replicas = [FakeReplica(0, PLANNED), FakeReplica(1, ReplicaError("replica 1 failed: no such model"))]
    with pytest.raises(ReplicaError, match="replica 1 failed: no such model"):
        plan_together(replicas, threading.Event())
    assert not any(each.began for each in replicas)


def test_where_all_die_there_is_no_result() -> None:
    replicas = [FakeReplica(number, PLANNED, ReplicaError("killed")) for number in range(2)]
    with pytest.raises(ReplicaError, match="every replica ended without a result"):
        run_together(replicas, threading.Event())


def test_an_interrupt_reaches_all_once_and_their_results_count() -> None:
    stop = threading.Event()
    replicas = [FakeReplica(number, PLANNED, outcome(INTERRUPTED), waits=True) for number in range(2)]
    plan_together(replicas, stop)
    stop.set()
    assert [each.ended for each in run_together(replicas, stop)] == [INTERRUPTED, INTERRUPTED]
    assert [each.interrupts for each in replicas] == [1, 1]


def test_an_interrupt_keeps_the_results_of_others_where_one_died(capsys: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()
    stop.set()
    replicas = [FakeReplica(0, PLANNED, outcome(INTERRUPTED)), FakeReplica(1, PLANNED, ReplicaError("replica 1 died"))]
    assert [each.ended for each in run_together(replicas, stop)] == [INTERRUPTED, DIED]
    assert capsys.readouterr().err == "benchmark: replica 1 died; 2 requests are lost\n"


def test_an_interrupt_before_the_start_reaches_all_and_has_no_result() -> None:
    replicas = [FakeReplica(0, PLANNED, waits=True), FakeReplica(1, KeyboardInterrupt(), waits=True)]
    with pytest.raises(KeyboardInterrupt):
        plan_together(replicas, threading.Event())
    assert [each.interrupts for each in replicas] == [1, 1] and not any(each.began for each in replicas)


def test_an_interrupt_has_no_result_where_all_died() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        run_together([FakeReplica(0, PLANNED, ReplicaError("ended"))], stop)


class InterruptedRunner:
    """In place of BenchmarkRunner: a signal comes when all requests have been answered."""

    number: signal.Signals

    def __init__(self, config: object, replica: int = 0, *, device: None, stop: threading.Event) -> None:
        self._stop = stop

    def __enter__(self) -> "InterruptedRunner":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def workload(self, config: object = None) -> list[RequestSpec]:
        return []

    def warm_up(self, specs: list[RequestSpec]) -> None:
        pass

    def planned(self, specs: list[RequestSpec]) -> object:
        return PLANNED

    def run(self, specs: list[RequestSpec], profile_folder: Path) -> RunOutcome:
        signal.raise_signal(self.number)
        assert self._stop.is_set()
        return outcome()


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_a_replica_tells_its_outcome_though_a_signal_comes_while_it_makes_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "BenchmarkRunner", InterruptedRunner)
    monkeypatch.setattr(process, "end_with_parent", lambda parent: None)
    monkeypatch.setattr(InterruptedRunner, "number", number, raising=False)
    before = signal.signal(number, signal.default_int_handler)  # it may be ignored here
    ours, theirs = Pipe()
    try:
        ours.send(None)
        process._run_replica(parse_options([]), 0, None, theirs, 0)
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    theirs.close()
    assert (ours.recv(), ours.recv()) == (PLANNED, outcome())


@contextmanager
def finished_replicas(*_: object) -> Iterator[Sequence[Replica]]:
    """In place of started_processes."""
    yield [FakeReplica(number, PLANNED, outcome()) for number in range(2)]


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_a_signal_after_the_last_request_does_not_lose_the_result(
    number: signal.Signals, num_replicas: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The signal comes before the files are written and twice while they are; the second run is not started."""
    monkeypatch.setattr(run, "BenchmarkRunner", InterruptedRunner)
    monkeypatch.setattr(run, "started_processes", finished_replicas)
    monkeypatch.setattr(InterruptedRunner, "number", number, raising=False)

    def write_report(*words: Any) -> Any:
        signal.raise_signal(number)
        signal.raise_signal(number)
        return write_results(*words)

    write_results = main_module.write_results
    monkeypatch.setattr(main_module, "write_results", write_report)
    before = signal.signal(number, signal.default_int_handler)  # it may be ignored here
    folders = [tmp_path / "first", tmp_path / "second"]
    words = [f"--num_replicas={num_replicas}"]
    try:
        code = run_configs(lambda: [parse_options([*words, f"--output_dir={folder}"]) for folder in folders])
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert code == EXIT_INTERRUPTED
    assert json.loads((folders[0] / "summary.json").read_text())["ended"] == COMPLETED
    assert not (folders[1] / "summary.json").exists()
