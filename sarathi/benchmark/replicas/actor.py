"""Replicas as Ray actors, each in a placement group with its ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sarathi.benchmark.config.engine import engine_config
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.replicas.base import Replica, ReplicaError
from sarathi.benchmark.run.outcome import Planned, RunOutcome
from sarathi.benchmark.run.runner import BenchmarkRunner
from sarathi.benchmark.workload import RequestSpec
from sarathi.executor.ray.executor import connect, reason_of
from sarathi.executor.ray.placement import Reservation, check_room, device_of_ranks, reserve

_END_S = 10.0


class ReplicaActor:
    """An engine whose ranks are actors of the same placement group. `stop` may be called during `run`."""

    def __init__(self, config: BenchmarkConfig, replica: int) -> None:
        self._config, self._replica = config, replica
        self._specs: list[RequestSpec] = []
        self._runner: BenchmarkRunner | None = None
        self._stop = threading.Event()

    def plan(self) -> Planned:
        """Load and warm up the engine; returns the requests that it will serve."""
        runner = self._runner = BenchmarkRunner(self._config, self._replica, stop=self._stop, clock=_make_clock())
        self._specs = runner.workload()
        runner.warm_up(self._specs)
        return runner.planned(self._specs)

    def run(self) -> RunOutcome:
        assert self._runner is not None
        return self._runner.run(self._specs, Path(self._config.output_dir))

    def stop(self) -> None:
        """End the run with partial results."""
        self._stop.set()

    def close(self) -> None:
        """End the ranks."""
        if self._runner is not None:
            self._runner.close()


class RayReplica(Replica):
    """An actor in the first bundle of its placement group. It has no device: the ranks do."""

    def __init__(self, number: int, config: BenchmarkConfig, place: Reservation) -> None:
        super().__init__(number)
        self._place = place
        where = PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=place.bundles[0])
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 2}
        create: Any = ray.remote(ReplicaActor).options(scheduling_strategy=where, **options)
        self._actor = create.remote(config, number)
        self._answer = self._actor.plan.remote()

    def begin(self) -> None:
        self._answer = self._actor.run.remote()

    def interrupt(self) -> None:
        self._actor.stop.remote()

    def is_ready(self, timeout_s: float) -> bool:
        ready, _ = ray.wait([self._answer], timeout=timeout_s)
        return bool(ready)

    def end(self) -> None:
        try:
            with suppress(RayError, GetTimeoutError):
                ray.get(self._actor.close.remote(), timeout=_END_S)
            ray.kill(self._actor)
        finally:
            self._place.release()

    def _receive(self) -> Any:
        try:
            return ray.get(self._answer)
        except RayActorError as error:
            raise ReplicaError(f"replica {self._number} died: {reason_of(error)}") from error
        except RayTaskError as error:
            raise ReplicaError(f"replica {self._number} failed: {error.cause}") from error


def _make_clock() -> Callable[[], float]:
    """A monotonic clock in seconds, comparable between machines as far as their system clocks agree."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


@contextmanager
def started_actors(config: BenchmarkConfig) -> Iterator[Sequence[Replica]]:
    """Start the replicas of a run as actors. PlacementError if the cluster has too few resources."""
    connect()
    settings = engine_config(config)
    device, count = device_of_ranks(settings), config.cluster.num_replicas
    num_ranks = settings.parallel.tensor_parallel_size * settings.parallel.pipeline_parallel_size
    check_room(f"{count} replicas of {num_ranks} ranks need", count * num_ranks, device)
    with ExitStack() as stack:
        places = []
        for _ in range(count):
            places.append(reserve(num_ranks, device, settings.parallel.ray_placement))
            stack.callback(places[-1].release)
        replicas = []
        for number, place in enumerate(places):
            replicas.append(RayReplica(number, config, place))
            stack.callback(replicas[-1].end)
        yield replicas
