"""Executor whose ranks are Ray actors.

Ray places the ranks and watches their processes. Commands, replies and votes go over sockets between executor and
ranks, not over Ray calls.
"""

import fcntl
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # stubs lack it

from sarathi.config.schema import EngineConfig
from sarathi.executor.ranks import service
from sarathi.executor.ranks.executor import RanksExecutor
from sarathi.executor.ranks.group import RankError
from sarathi.executor.ranks.protocol import RankEnd, RankSetup, Reply, Transport, kill_and_close
from sarathi.executor.ray.channel import Hub, HubAddresses, Link, Votes
from sarathi.executor.ray.placement import device_of_ranks, reserve
from sarathi.model_executor.parallel.ranks import RankGrid
from sarathi.model_executor.sampling.grammar import MakeVocabulary, no_vocabulary

_GET_INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


class Place(NamedTuple):
    """The process of a rank."""

    host: str
    pid: int


class RankActor:
    """One rank."""

    def place(self) -> Place:
        return Place(ray.util.get_node_ip_address(), os.getpid())

    def serve(self, setup: RankSetup, hub: HubAddresses) -> None:
        """Until the executor sends "close", or Ray ends this process."""
        host = ray.util.get_node_ip_address()
        _use_network_of(host)
        link = Link(setup.rank, hub)
        threading.Thread(target=link.beat_forever, daemon=True).start()
        store = TCPStore(*setup.store, is_master=False)
        service.serve(link, setup, Votes(setup.rank, setup.grid.size, host, store).agree)


class _ActorTransport(Transport):
    """Actors in a placement group, and the sockets to them."""

    end_delay_s = 5.0  # Ray tells of an actor's death through several processes, on a busy machine too

    def __init__(self, size: int, device: str, strategy: str) -> None:
        self.size = size
        self.host = ray.util.get_node_ip_address()
        self._hub = Hub(self.host, size)
        self._actors: list[Any] = []
        self._served: list[Any] = []
        self._place = reserve(size, device, strategy)
        try:
            self._actors = [_create_actor(self._place.group, bundle, device) for bundle in self._place.bundles]
            self.places: list[Place] = ray.get([actor.place.remote() for actor in self._actors])
        except RayError as error:
            kill_and_close(self)
            raise RankError(f"Ray could not start {size} ranks: {error}") from error
        except BaseException:
            kill_and_close(self)
            raise

    def start(self, make_setup: Callable[[int], RankSetup]) -> None:
        """Start every rank from its setup."""
        try:
            for rank, actor in enumerate(self._actors):
                self._served.append(actor.serve.remote(make_setup(rank), self._hub.addresses))
            self._hub.wait_for_ranks(self._check_starting)
        except BaseException:
            kill_and_close(self)
            raise

    def send(self, message: bytes) -> None:
        self._hub.send(message)

    def receive(self, timeout_s: float) -> list[tuple[int, Reply | None]]:
        replies = self._hub.receive(timeout_s)
        return replies or [(rank, None) for rank in range(self.size) if self.end(rank) is not None]

    def silence_s(self, rank: int) -> float:
        return self._hub.silence_s(rank)

    def end(self, rank: int) -> RankEnd | None:
        if not ray.wait([self._served[rank]], timeout=0)[0]:
            return None
        try:
            ray.get(self._served[rank])
        except RayActorError as error:
            return RankEnd(f"died: {reason_of(error)}", is_cause=True)
        except RayError as error:
            return RankEnd(f"ended: {error}", is_cause=False)
        return RankEnd("ended", is_cause=False)

    def place(self, rank: int) -> str:
        host, pid = self.places[rank]
        return f"process {pid} on {host}"

    def kill(self) -> None:
        """Ray takes some seconds for a process that is stopped."""
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
            self._place.release()

    def close(self) -> None:
        self._hub.close()

    def _check_starting(self) -> None:
        for rank in range(self.size):
            if (end := self.end(rank)) is not None:
                raise RankError(f"rank {rank} of {self.size} ({self.place(rank)}) {end.text}")


class RayExecutor(RanksExecutor):
    """One actor a rank, in the cluster that this process is connected to, or that RAY_ADDRESS or `ray start` names.

    Raises ValueErrors that name the setting which cannot work.
    """

    def __init__(self, config: EngineConfig, make_vocabulary: MakeVocabulary = no_vocabulary) -> None:
        parallel = config.parallel
        grid = RankGrid(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        connect()
        device = device_of_ranks(config)
        transport = _ActorTransport(grid.size, device, parallel.ray_placement)
        self._store = TCPStore(transport.host, 0, is_master=True, wait_for_workers=False)
        store = (transport.host, self._store.port)
        name = "cuda:0" if device == "cuda" else device  # the one GPU that Ray shows the actor
        transport.start(lambda rank: RankSetup(config, rank, grid, name, 1, store, make_vocabulary))
        super().__init__(transport, parallel, store)


def connect() -> None:
    """To the cluster that RAY_ADDRESS or `ray start` names, else a new one on this machine; where none is connected."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.WARNING)


def _create_actor(group: Any, bundle: int, device: str) -> Any:
    resources = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": 1}
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return ray.remote(RankActor).options(scheduling_strategy=strategy, max_restarts=0, **resources).remote()


def reason_of(error: RayActorError) -> str:
    """The first sentence of how the process ended, of Ray's advice on it."""
    text = str(error)
    return (text.partition("Worker exit detail: ")[2] or text).partition(". ")[0]


def _use_network_of(host: str) -> None:
    """Ranks exchange tensors over the network that Ray uses, unless the environment names another."""
    name = _interface_of(host)
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name else ():
        os.environ.setdefault(key, name)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # see executor.ranks.multiproc


def _interface_of(host: str) -> str:
    """The network interface with this IPv4 address; "" where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _GET_INTERFACE_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    return ""
