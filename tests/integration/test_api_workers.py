"""`sarathi serve --api-workers 2`: one engine behind several API processes, some of which die."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from http_server import LIMIT_S, LONG, RunningServer, documented, metric, options, running_server, wait_until
from process_tree import children, is_alive

from sarathi import LLM, SamplingParams

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[RunningServer]:
    chosen = options(max_num_seqs=16, max_waiting_requests=40, heartbeat_timeout_s=12)
    with running_server(model, *documented("--api-workers"), *chosen) as server:
        yield server
        started = [server.process.pid, *processes(server)]
        assert server.end(timeout_s=LIMIT_S) == 0
        wait_until(lambda: not any(map(is_alive, started)), "processes are left")


def processes(server: RunningServer) -> dict[int, str]:
    """Kinds of the server's own processes by id: "worker" or "core"."""
    found = {}
    for child in children(server.process.pid):
        words = Path(f"/proc/{child}/cmdline").read_text()
        found[child] = "worker" if "workers.worker" in words else "core"
    return found


def workers(server: RunningServer) -> list[int]:
    return [pid for pid, kind in processes(server).items() if kind == "worker"]


def post(server: RunningServer, **body: object) -> httpx.Response:
    return server.post("/v1/completions", json={**LONG, **body})


class Streams:
    """Streams over connections of their own, which run; all at one of two workers once in 32,768 times."""

    COUNT = 16

    def __init__(self, server: RunningServer, tokens: int) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(self.COUNT)
        self.ends = [self._pool.submit(self._read, tokens) for _ in range(self.COUNT)]
        wait_until(lambda: metric(server, "num_requests_running") == self.COUNT, "the streams do not run")

    def _read(self, tokens: int) -> str:
        """How the stream ended: the last data, or "cut"."""
        body, last = {**LONG, "max_tokens": tokens, "stream": True}, ""
        try:
            with httpx.stream("POST", f"{self._server.url}/v1/completions", json=body, timeout=LIMIT_S) as response:
                for line in response.iter_lines():
                    last = line or last
        except httpx.HTTPError:
            return "cut"
        return last.removeprefix("data: ")

    def last(self) -> list[str]:
        return [each.result(LIMIT_S) for each in self.ends]


def test_text_is_that_of_one_process_and_counts_are_those_of_all(server: RunningServer, model: str) -> None:
    prompts = [f"Once upon a time {number}" for number in range(12)]
    with LLM(model=model, memory_bytes="64mb") as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        expected = [each.outputs[0].text for each in llm.generate(prompts, params, use_tqdm=False)]
    before = metric(server, "generation_tokens_total"), metric(server, "request_success_total")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: post(server, prompt=prompt, max_tokens=20).json(), prompts))
    assert [each["choices"][0]["text"] for each in answers] == expected
    for _ in range(4):  # whichever process answers
        after = metric(server, "generation_tokens_total"), metric(server, "request_success_total")
        assert (after[0] - before[0], after[1] - before[1]) == (240, 12)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_takes_its_own_requests_alone(server: RunningServer, number: signal.Signals) -> None:
    victim, other = workers(server)
    streams = Streams(server, tokens=3000)
    os.kill(victim, number)
    ends = streams.last()
    assert set(ends) == {"cut", "[DONE]"}
    wait_until(lambda: len(workers(server)) == 2 and victim not in workers(server), "no new worker came up")
    assert other in workers(server) and not is_alive(victim)
    wait_until(lambda: metric(server, "num_requests_running") == 0, "requests of the dead worker run on")
    assert metric(server, "kv_cache_usage_perc") == 0
    for _ in range(8):
        assert post(server, max_tokens=2).status_code == 200


def test_limits_hold_over_all_workers(server: RunningServer) -> None:
    with ThreadPoolExecutor(120) as pool:
        answers = list(pool.map(lambda _: post(server, max_tokens=1000), range(120)))
    statuses = [each.status_code for each in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 16
    assert all("Retry-After" in each.headers for each in answers if each.is_error)


def test_sigterm_lets_requests_end(model: str) -> None:
    with running_server(model, *options(api_workers=2, shutdown_timeout_s=LIMIT_S)) as server:
        started = processes(server)
        streams = Streams(server, tokens=2000)
        assert server.end(timeout_s=LIMIT_S) == 0
        assert set(streams.last()) == {"[DONE]"}
        assert not any(map(is_alive, started))


def test_the_death_of_the_core_is_told_by_all_and_ends_the_server(model: str) -> None:
    with running_server(model, *options(api_workers=2)) as server:
        started = processes(server)
        streams = Streams(server, tokens=30000)
        [core] = [pid for pid, kind in started.items() if kind == "core"]
        os.kill(core, signal.SIGKILL)
        assert all("the core process ended" in json.loads(last)["error"]["message"] for last in streams.last())
        assert server.process.wait(LIMIT_S) == 1
        wait_until(lambda: not any(map(is_alive, started)), "processes are left")


def test_nothing_outlives_the_supervisor_not_even_what_is_stopped(model: str) -> None:
    with running_server(model, *options(api_workers=2)) as server:
        started = processes(server)
        assert sorted(started.values()) == ["core", "worker", "worker"]
        for pid, kind in started.items():
            if kind == "worker":
                os.kill(pid, signal.SIGSTOP)
        server.process.kill()
        wait_until(lambda: not any(map(is_alive, started)), "processes are left")
