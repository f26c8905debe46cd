"""`sarathi serve --replicas 2` and a YAML for Ray Serve, over a real Ray on this machine: answers, routing, deaths."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import yaml
from http_server import LIMIT_S, LONG, ROOT, RunningServer, documented, options, running_server, wait_until
from process_tree import descendants, is_alive
from prometheus_client.parser import text_string_to_metric_families

from sarathi import LLM, SamplingParams

pytestmark = pytest.mark.slow
RUNNING = 2  # requests that run at the same time at a replica
LOCAL_RAY = {"RAY_ADDRESS": "local"}


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[RunningServer]:
    chosen = options(max_num_seqs=RUNNING, max_waiting_requests=32, prefix_affinity_lead=1)
    with running_server(model, *documented("--replicas"), *chosen, env=LOCAL_RAY) as server:
        yield server
        started = descendants(server.process.pid)
        assert server.end(timeout_s=LIMIT_S) == 0
        wait_until(lambda: not any(map(is_alive, started)), "processes are left")


def replica_pids(server: RunningServer) -> list[int]:
    names = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(server.process.pid)}
    return [pid for pid, path in names.items() if path.exists() and b"ServeReplica" in path.read_bytes()]


def by_replica(server: RunningServer, name: str) -> Counter[str]:
    """A metric of each replica, summed over its other labels."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for each in family.samples:
            if each.name == f"sarathi:{name}":
                found[each.labels["replica"]] += each.value
    return found


def complete(server: RunningServer, **body: object) -> dict:
    answer = server.post("/v1/completions", json={**LONG, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream_text(server: RunningServer, **body: object) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S)
    chunks = client.completions.create(model=client.models.list().data[0].id, stream=True, temperature=0, **body)
    return "".join(each.choices[0].text for each in chunks)


def test_a_burst_is_spread_where_serve_knows_one_queue_only() -> None:
    """Serve forgets a replica's queue length after seconds without requests, and prefers those that it knows."""
    from sarathi.entrypoints.replicas.router import PrefixRouter  # it imports ray.serve, which takes seconds

    router = object.__new__(PrefixRouter)
    router.initialize_state(lead=8)
    router._use_replica_queue_len_cache = False
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"]
    sent: Counter[str] = Counter()
    for _ in range(30):
        ranks = asyncio.run(router.choose_replicas(replicas, None))
        assert sorted(each.replica_id.unique_id for rank in ranks for each in rank) == ["a", "b", "c"]
        chosen = min(ranks[0], key=lambda each: each.replica_id.unique_id).replica_id  # `a` where it may be
        router.on_send_request(chosen)
        for each in replicas:  # as when it sends to all
            router.on_send_request(each.replica_id)
            router.on_request_completed(each.replica_id, "")
        sent[chosen.unique_id] += 1
    assert sent == {"a": 10, "b": 10, "c": 10}


def test_text_is_that_of_one_engine(server: RunningServer, model: str) -> None:
    prompts = [f"Once upon a time {number}" for number in range(8)]
    with LLM(model=model, memory_bytes="64mb") as llm:
        expected = [
            each.outputs[0].text
            for each in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
        ]
    with ThreadPoolExecutor(8) as pool:
        whole = list(pool.map(lambda p: complete(server, prompt=p, max_tokens=40, ignore_eos=False), prompts))
        streamed = list(pool.map(lambda p: stream_text(server, prompt=p, max_tokens=40), prompts))
    assert [each["choices"][0]["text"] for each in whole] == expected == streamed
    assert min(by_replica(server, "request_success_total").values()) > 0


def test_a_prompt_goes_where_its_beginning_is_unless_that_replica_is_busy(server: RunningServer) -> None:
    text = os.urandom(2000).hex()
    before = by_replica(server, "generation_tokens_total")
    for number in range(6):
        complete(server, prompt=text + str(number), max_tokens=1)
    one = by_replica(server, "generation_tokens_total") - before
    assert list(one.values()) == [6]
    assert sum(by_replica(server, "prefix_cache_hits_total").values()) > 0
    with ExitStack() as streams:
        for _ in range(RUNNING + 1):  # the first two go where the beginning is
            body = {**LONG, "prompt": text, "stream": True}
            streams.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=LIMIT_S))
        wait_until(lambda: min(by_replica(server, "num_requests_running").values()) > 0, "one replica has all requests")
    wait_until(lambda: sum(by_replica(server, "num_requests_running").values()) == 0, "requests run on")


def test_a_conversation_finds_its_responses(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S)
    name = client.models.list().data[0].id
    for _ in range(4):
        first = client.responses.create(model=name, input="a", max_output_tokens=2)
        second = client.responses.create(model=name, input="b", previous_response_id=first.id, max_output_tokens=2)
        assert client.responses.retrieve(second.id).previous_response_id == first.id


def test_a_client_that_leaves_frees_its_memory(server: RunningServer) -> None:
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=LIMIT_S
    ) as response:
        lines = response.iter_lines()  # closing it closes the connection
        next(lines)
        wait_until(lambda: sum(by_replica(server, "num_requests_running").values()) == 1, "the request does not run")
    wait_until(lambda: sum(by_replica(server, "num_requests_running").values()) == 0, "the request runs on")


def test_errors_are_those_of_one_server(server: RunningServer) -> None:
    post = httpx.Client(base_url=server.url, timeout=LIMIT_S, limits=httpx.Limits(max_connections=None)).post
    assert post("/v1/completions", content=b"{").status_code == 400
    assert post("/v1/nothing").status_code == 404
    long = post("/v1/completions", json={"prompt": "x" * 40000})
    assert long.json()["error"]["code"] == "context_length_exceeded"
    named = post("/v1/completions", json={**LONG, "max_tokens": 1}, headers={"x-request-id": "mine"})
    assert named.headers["x-request-id"] == "mine" and named.status_code == 200
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: post("/v1/completions", json={**LONG, "max_tokens": 150}), range(200)))
    statuses = Counter(each.status_code for each in answers)
    assert set(statuses) == {200, 429} and all("Retry-After" in each.headers for each in answers if each.is_error)


class Load:
    """Requests by how they end: those that run at both replicas until they are cut off, and those that wait there."""

    def __init__(self, server: RunningServer, client: httpx.AsyncClient) -> None:
        self._server, self._client = server, client
        self.running: list[asyncio.Task[str]] = []
        self.waiting: list[asyncio.Task[str]] = []

    async def start(self, count: int) -> None:
        """Return when a stream and a whole answer run at each replica, and `count` of each kind wait."""
        for send in (self._stream, self._stream, self._whole, self._whole):
            self.running.append(asyncio.create_task(send(LONG)))  # one by one: each goes to the idlest replica
            await self._until("num_requests_running", len(self.running))
        body = {**LONG, "max_tokens": 200}
        self.waiting = [asyncio.create_task(send(body)) for send in [self._stream, self._whole] * count]
        await self._until("num_requests_waiting", len(self.waiting))

    async def end(self) -> tuple[Counter[str], Counter[str]]:
        """How those end that have run where something died, and those that waited anywhere."""
        await until(lambda: sum(each.done() for each in self.running) == RUNNING, "requests of the dead run on")
        lost = Counter(each.result() for each in self.running if each.done())
        for each in self.running:
            each.cancel()
        return lost, Counter(await asyncio.gather(*self.waiting))

    async def _until(self, name: str, total: int) -> None:
        await until(lambda: sum(by_replica(self._server, name).values()) == total, f"{name} is not {total}")

    async def _stream(self, body: dict) -> str:
        lines = []
        async with self._client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                lines += [line.removeprefix("data: ")] if line else []
        if lines[-1] == "[DONE]":
            return "stream done"
        return "stream error" if "error" in json.loads(lines[-1]) else "stream cut"

    async def _whole(self, body: dict) -> str:
        answer = await self._client.post("/v1/completions", json=body)
        told = answer.json()
        if answer.status_code == 503:
            return "error" if told["error"]["code"] == "unavailable" else "other error"
        return "done" if told["usage"]["completion_tokens"] == body["max_tokens"] else "short"


async def until(condition: Callable[[], bool], failure: str) -> None:
    await asyncio.to_thread(wait_until, condition, failure)


def wait_for_both(server: RunningServer) -> set[str]:
    """The names of both replicas, when requests are sent to either."""

    def both_answer() -> bool:
        complete(server, max_tokens=1)
        counts = by_replica(server, "request_success_total")
        return len(counts) == 2 and min(counts.values()) > 0

    wait_until(both_answer, "there are not two replicas")
    return set(by_replica(server, "num_requests_running"))


@pytest.mark.parametrize("victim", ["replica", "engine"])
def test_the_death_of_a_replica_leaves_nothing_unanswered(server: RunningServer, victim: str) -> None:
    """What ran there ends with an error, what waited is answered by the other one, and a new one comes up."""
    before, pid = wait_for_both(server), replica_pids(server)[0]
    [core] = [each for each in descendants(pid) if is_alive(each)]

    async def ends() -> tuple[Counter[str], Counter[str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT_S, limits=limits) as client:
            load = Load(server, client)
            await load.start(6)
            os.kill(pid if victim == "replica" else core, signal.SIGKILL)
            return await load.end()

    lost, answered = asyncio.run(ends())
    assert lost == {"stream error": 1, "error": 1}
    assert answered == {"stream done": 6, "done": 6}
    wait_until(lambda: not any(map(is_alive, (pid, core))), "what was killed runs on")
    assert len(wait_for_both(server) & before) == 1
    assert server.get("/health").status_code == 200


class Askers:
    """Clients that ask again as soon as they have an answer, which must be whole."""

    def __init__(self, server: RunningServer, count: int) -> None:
        self._server, self._num_wanted = server, count
        self._pool = ThreadPoolExecutor(count)
        self._all = [self._pool.submit(self._ask, number) for number in range(count)]

    def keep(self, count: int) -> None:
        """Return when so many are left."""
        self._num_wanted = count
        for each in self._all[count:]:
            each.result(LIMIT_S)

    def _ask(self, number: int) -> None:
        while number < self._num_wanted:
            complete(self._server, max_tokens=200)


def test_an_engine_is_started_under_load_and_stopped_after_it(model: str) -> None:
    """No request is lost on the way up or down."""
    scaling = options(max_replicas=2, requests_per_replica=2, scale_up_delay_s=1, scale_down_delay_s=1)
    with running_server(model, *scaling, env=LOCAL_RAY) as server:
        assert len(replica_pids(server)) == 1
        askers = Askers(server, 8)
        try:
            wait_until(lambda: len(by_replica(server, "request_success_total")) == 2, "no second engine serves")
            print(dict(by_replica(server, "request_success_total")))
            askers.keep(1)
            wait_until(lambda: len(replica_pids(server)) == 1, "the second engine is not stopped")
        finally:
            askers.keep(0)
        assert len(by_replica(server, "num_requests_running")) == 1
        assert server.end() == 0


def test_the_yaml_of_the_docs_deploys_engines_behind_serve_s_own_address(model: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    engine = config["applications"][0]["args"]["engine"]
    engine["model"] = {"model": model, "device": "cpu"}
    engine["cache"]["memory_bytes"] = "64mb"
    config["http_options"] = {"port": free_port()}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    words = (str(Path(sys.executable).parent / "serve"), "run", str(file))
    env = os.environ | LOCAL_RAY | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
    server = RunningServer(process, f"http://127.0.0.1:{config['http_options']['port']}")
    try:
        wait_until(lambda: is_ready(server), "the application is not ready")
        whole = complete(server, prompt="a", max_tokens=5, ignore_eos=False)["choices"][0]["text"]
        assert stream_text(server, prompt="a", max_tokens=5) == whole
        wait_until(lambda: len(by_replica(server, "num_requests_running")) == 2, "there are not two replicas")
        assert server.post("/v1/messages", json={}).json()["type"] == "error"
        started = descendants(process.pid)
    finally:
        print((tmp_path / "log").read_text())
        process.terminate()
        process.wait(LIMIT_S)
    wait_until(lambda: not any(map(is_alive, started)), "processes are left")


def is_ready(server: RunningServer) -> bool:
    assert server.process.poll() is None
    try:
        return server.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    """Not one of those that the system gives to connections of others, nor one of Ray's (10002-19999)."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(20_000, max(first, 20_001))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
