"""Ranks as Ray actors in a real cluster of two raylets on this machine: outputs, failures, and what is left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import ray
from http_server import wait_until
from process_tree import descendants, is_alive
from random_driver import RandomDriver
from rank_helpers import (
    GREEDY,
    check_greedy,
    check_that_a_kill_ends_waiting_commands,
    make_executor,
    settings_for,
    step_until_it_fails,
)
from ray._private import services
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tiny_models import EVERYTHING, TinyModel, build, largest_difference, random_prompts

from sarathi import LLM
from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.replicas.run import run_all
from sarathi.benchmark.results import write_results
from sarathi.engine.prefill_decode.core import PrefillDecodeCore
from sarathi.executor.ranks.executor import RanksExecutor
from sarathi.executor.ranks.group import RankError
from sarathi.executor.ray import placement
from sarathi.messages import SchedulerOutput

RAY = {"executor": "ray"}
STORE_BYTES = 80 * 2**20
GONE_S = 60  # Ray kills a stopped process after 5


def patient(get_node: Callable[..., dict]) -> Callable[..., dict]:
    """Waits for a node to be known. Ray gives up after 30 s, in which a busy machine has not started it."""

    def get(*arguments: object) -> dict:
        found: list[dict] = []

        def is_known() -> bool:
            with suppress(RuntimeError):
                found.append(get_node(*arguments))
            return bool(found)

        wait_until(is_known, "Ray has not started a node")
        return found[0]

    return get


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines, as far as Ray knows: one CPU and two."""
    with mock.patch.object(services, "get_node", patient(services.get_node)):
        found = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False},
        )
        found.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    ray.init(address=found.address, log_to_driver=False, logging_level="error")
    yield found
    ray.shutdown()
    found.shutdown()


def pids_of(executor: RanksExecutor) -> list[int]:
    return [place.pid for place in executor._ranks._transport.places]  # type: ignore[attr-defined]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + GONE_S
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def check_nothing_is_left(pids: list[int]) -> None:
    wait_until_gone(pids)
    assert {each["state"] for each in placement_group_table().values()} <= {"REMOVED"}
    deadline = time.monotonic() + GONE_S
    while (free := ray.available_resources().get("CPU")) != 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert free == 3


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_compute_what_transformers_computes(cluster: Cluster, size: int, tmp_path: Path) -> None:
    """Two fit on one machine, three do not."""
    model = build("yi", tmp_path, intermediate_size=84)
    executor = make_executor(model, **RAY, tensor_parallel_size=size)
    pids = pids_of(executor)
    nodes = {each["NodeID"] for each in ray.nodes()}
    used = {
        node
        for group in placement_group_table().values() if group["state"] == "CREATED"
        for node in group["bundles_to_node_id"].values()
    }  # fmt: skip
    assert len(nodes) == 2 and len(used) == size - 1
    prompts = dict(random_prompts(size, 4, 30))
    tokens = RandomDriver(executor, size).run(prompts, EVERYTHING, 4)
    assert executor.memory_stats().mapped_bytes > 0
    executor.shutdown()
    assert max(largest_difference(model, prompt, tokens[name]) for name, prompt in prompts.items()) < 1e-4
    check_nothing_is_left(pids)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa_paged_4", "sdpa_vattn_4kb"])
def test_a_pipeline_and_preemption_change_nothing(cluster: Cluster, tiny: TinyModel, backend: str) -> None:
    prompts = [[prompt[0]] * 105 + prompt for _, prompt in random_prompts(7, 6, 16)]  # a page holds 128 tokens
    params = replace(GREEDY, max_tokens=25)
    outputs = []
    for executor in ("ray", "multiproc"):
        settings = settings_for(
            tiny,
            executor=executor,
            pipeline_parallel_size=2,
            attention_backend=backend,
            memory_bytes=5 * 6 * 4096,
            chunk_size=100,
        )
        with LLM(**settings) as llm:
            done = llm.generate(prompts, params, use_tqdm=False)
            assert llm.engine.core.scheduler.num_preemptions  # type: ignore[attr-defined]
            llm.engine.core.executor.check_integrity()  # type: ignore[attr-defined]
        outputs.append([list(each.outputs[0].token_ids) for each in done])
    assert outputs[0] == outputs[1]


@pytest.mark.slow
@pytest.mark.usefixtures("short_silence")
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("how", "message"), [(signal.SIGKILL, "died: "), (signal.SIGSTOP, "hangs: no sign of life")])
def test_a_rank_that_dies_or_hangs_is_named(
    cluster: Cluster, rank: int, how: signal.Signals, message: str, tmp_path: Path
) -> None:
    executor = make_executor(build("yi", tmp_path, intermediate_size=84), **RAY, tensor_parallel_size=3)
    pids = pids_of(executor)
    timer = threading.Timer(0.5, os.kill, (pids[rank], how))
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {rank} of 3 \(process {pids[rank]} on [\d.]+\) {message}"):
        step_until_it_fails(executor)
    assert time.monotonic() - began_s < 60
    with pytest.raises(RankError, match=f"the ranks have ended: rank {rank} of 3"):
        executor.launch(SchedulerOutput(0))
    executor.shutdown()
    check_nothing_is_left(pids)


@pytest.mark.slow
def test_what_one_actor_prefills_another_decodes_until_one_of_them_dies(cluster: Cluster, tiny: TinyModel) -> None:
    prompts = [prompt for _, prompt in random_prompts(11, 8, 100)]
    llm = LLM(**settings_for(tiny, **RAY, prefill_decode=True, prefill_chunk_size=32))
    core = llm.engine.core
    assert isinstance(core, PrefillDecodeCore)
    prefill, decode = pids_of(core._prefill_thread.executor), pids_of(core.executor)
    outputs = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, GREEDY, use_tqdm=False)]
    check_greedy(outputs, tiny, prompts, 12)
    os.kill(prefill[0], signal.SIGKILL)
    with pytest.raises(RankError, match=rf"prefill rank 0 of 1 \(process {prefill[0]} on [\d.]+\) died: "):
        while True:
            llm.generate(prompts, GREEDY, use_tqdm=False)
    llm.close()
    check_nothing_is_left(prefill + decode)


@pytest.mark.slow
def test_a_kill_from_another_thread_ends_a_command_that_waits(cluster: Cluster, tiny: TinyModel) -> None:
    executor = make_executor(tiny, **RAY, tensor_parallel_size=2)
    pids = pids_of(executor)
    check_that_a_kill_ends_waiting_commands(executor, pids[1])
    check_nothing_is_left(pids)


_KILLED = """
import os, ray, signal
ray.init(address={address!r}, log_to_driver=False, logging_level="error")
from sarathi.config.load import make_config
from sarathi.executor.ray.executor import RayExecutor
executor = RayExecutor(make_config(**{settings!r}))
print(*[place.pid for place in executor._ranks._transport.places], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_ranks_end_with_an_executor_that_is_killed(cluster: Cluster, tiny: TinyModel) -> None:
    program = _KILLED.format(address=cluster.address, settings=settings_for(tiny, **RAY, tensor_parallel_size=2))
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    pids = list(map(int, done.stdout.split()))
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    check_nothing_is_left(pids)


def test_what_cannot_be_placed_is_refused(cluster: Cluster, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_WAIT_S", 1.0)
    for settings, message in [
        ({"tensor_parallel_size": 4}, "4 ranks need 4 CPUs, and the Ray cluster has 3"),
        ({"tensor_parallel_size": 3, "ray_placement": "strict_pack"}, "ray_placement=strict_pack: .* 2 machines"),
        ({"device": "cuda"}, "2 ranks need 2 GPUs, and the Ray cluster has 0"),
        ({"device": "cuda:1"}, "device='cuda:1': with executor=ray"),
        ({"max_model_len": 257}, "max_model_len=257: the model has positions for at most 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_executor(tiny, **{**RAY, "tensor_parallel_size": 2, **settings})
    check_nothing_is_left([])


@pytest.fixture
def one_cpu_each(cluster: Cluster) -> Iterator[list[str]]:
    """Node ids of two machines, each with one free CPU."""

    class Occupant:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    nodes = sorted(ray.nodes(), key=lambda node: node["Resources"]["CPU"])
    ids = [node["NodeID"] for node in nodes]
    where = NodeAffinitySchedulingStrategy(ids[1], soft=False)
    occupant = ray.remote(Occupant).options(num_cpus=1, scheduling_strategy=where).remote()
    assert ray.get(occupant.node.remote()) == ids[1]
    yield ids
    ray.kill(occupant)
    check_nothing_is_left([])


def replicas_config(tiny: TinyModel, folder: Path, *words: str) -> BenchmarkConfig:
    lengths = "--fixed_request_length_generator"
    return parse_options(
        [
            f"--model.name={tiny.folder}", "--model.device=cpu", "--kv_cache_bytes=2mb", "--show_progress=false",
            "--num_replicas=2", "--cluster.executor=ray", f"--output_dir={folder}", "--length_provider=fixed",
            f"{lengths}.prefill_tokens=9", "--metrics_store.write_plots=false", *words,
        ]
    )  # fmt: skip


def replica_pids(method: str) -> list[int]:
    """Processes of this test's replicas in which a method runs: Ray gives them such names."""
    found = []
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
            found += [pid] if name.startswith(f"ray::ReplicaActor.{method}".encode()) else []
    return found


@pytest.mark.slow
def test_replicas_on_two_machines_share_the_requests(
    one_cpu_each: list[str], tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []
    release = placement.Reservation.release

    def noted(place: placement.Reservation) -> None:
        places.extend(placement_group_table(place.group)["bundles_to_node_id"].values())
        release(place)

    monkeypatch.setattr(placement.Reservation, "release", noted)
    config = replicas_config(tiny, tmp_path, "--num_requests=5", "--fixed_request_length_generator.decode_tokens=4")
    [outcomes] = run_all([config])
    summary = write_results(config, outcomes)
    assert set(places) == set(one_cpu_each)
    assert (summary["ended"], summary["num_finished"], summary["num_lost"]) == ("completed", 5, 0)
    assert sorted(outcome.num_finished for outcome in outcomes) == [2, 3]


@pytest.mark.slow
def test_a_replica_that_dies_is_told_and_its_requests_are_counted(
    one_cpu_each: list[str], tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--num_requests=40", "--max_batch_size=1", "--fixed_request_length_generator.decode_tokens=200")
    config = replicas_config(tiny, tmp_path, *words)

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not (pids := replica_pids("run")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    [outcomes] = run_all([config])
    killer.join()
    summary = write_results(config, outcomes)
    assert (summary["ended"], summary["num_finished"], summary["num_lost"]) == ("a replica died", 20, 20)
    assert re.search(r"replica [01] died: .*; 20 requests are lost", capsys.readouterr().err)


def test_replicas_that_cannot_be_placed_are_refused(cluster: Cluster, tiny: TinyModel, tmp_path: Path) -> None:
    config = replicas_config(tiny, tmp_path, "--tensor_parallel_degree=2")
    with pytest.raises(ValueError, match="2 replicas of 2 ranks need 4 CPUs, and the Ray cluster has 3"):
        list(run_all([config]))
