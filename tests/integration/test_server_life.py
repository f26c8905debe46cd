"""A server's ends and limits: clients that leave, signals, a dead engine, full queues, keys, hostile connections."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from http_server import LIMIT_S, LONG, ROOT, RunningServer, metric, options, running_server, wait_until
from process_tree import children, is_alive, stopped

SHORT = {**LONG, "max_tokens": 3}
PATIENT = options(heartbeat_timeout_s=LIMIT_S)  # a stopped engine counts as alive


@pytest.fixture(scope="module")
def shared(model: str) -> Iterator[RunningServer]:
    limits = options(max_waiting_requests=4, max_num_seqs=2, max_body_bytes=10_000, log_interval_s=0.2)
    with running_server(model, *limits, "--log-requests") as server:
        yield server


@pytest.fixture(scope="module")
def impatient(model: str) -> Iterator[RunningServer]:
    """With limits that an honest client exceeds on a busy machine."""
    with running_server(model, *options(receive_timeout_s=1, send_timeout_s=1)) as server:
        yield server


def until(server: RunningServer, name: str, value: float, timeout_s: float = LIMIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while metric(server, name) != value:
        assert time.monotonic() < deadline_s, f"{name} is {metric(server, name)}, not {value}"
        time.sleep(0.02)


def until_idle(server: RunningServer) -> None:
    until(server, "num_requests_running", 0)
    until(server, "num_requests_waiting", 0)
    until(server, "kv_cache_usage_perc", 0)


def raw_request(**body: object) -> bytes:
    content = json.dumps({**LONG, **body}).encode()
    head = (
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


class OpenStream:
    """A stream that a thread reads to its end."""

    def __init__(self, server: RunningServer, **body: object) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._begun = self._pool.submit(lambda: None)
        self.lines: list[str] = []
        self.done = self._pool.submit(self._read, server.url, {**LONG, "stream": True, **body})
        deadline_s = time.monotonic() + LIMIT_S
        while not self.lines and not self.done.done():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def _read(self, url: str, body: dict) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LIMIT_S) as response:
            self.lines += [f"status {response.status_code}"]
            self.lines.extend(line for line in response.iter_lines() if line)

    def last(self) -> str:
        self.done.result(LIMIT_S)
        return self.lines[-1].removeprefix("data: ")


# Clients that leave.


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_memory(shared: RunningServer, stream: bool) -> None:
    until_idle(shared)
    aborted = metric(shared, "request_success_total")
    with socket.create_connection(("127.0.0.1", int(shared.url.rpartition(":")[2]))) as client:
        client.sendall(raw_request(stream=stream))
        until(shared, "num_requests_running", 1)
        assert metric(shared, "kv_cache_usage_perc") > 0
    until_idle(shared)
    assert metric(shared, "request_success_total") == aborted + 1


def test_a_client_that_does_not_read_is_left(impatient: RunningServer) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(impatient.url.rpartition(":")[2])))
        client.sendall(raw_request(stream=True, logprobs=20, n=4))
        until(impatient, "num_requests_running", 4)
        until(impatient, "num_requests_running", 0)  # buffers of megabytes fill first


@pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"\x00\xff\r\n" * 99])
def test_a_connection_without_a_request_is_closed(impatient: RunningServer, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(impatient.url.rpartition(":")[2])), timeout=LIMIT_S) as client:
        client.sendall(sent)
        with suppress(ConnectionResetError):
            while client.recv(4096):
                pass
    assert impatient.get("/health").status_code == 200


def test_a_body_that_does_not_arrive_is_not_waited_for(impatient: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", int(impatient.url.rpartition(":")[2])), timeout=LIMIT_S) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert b"408" in client.recv(4096)


# Limits.


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large_is_refused(shared: RunningServer, chunked: bool) -> None:
    body = json.dumps({**SHORT, "user": "x" * 20_000}).encode()
    content = (body[at : at + 1000] for at in range(0, len(body), 1000)) if chunked else body
    answer = shared.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "more than 10000 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"[" * 9000, b'{"prompt":' * 900, b"{" * 100, b"null", b"\xff\xfe", b"1e999", b""])
def test_bodies_that_are_no_request_are_refused(shared: RunningServer, body: bytes) -> None:
    for path in ("completions", "chat/completions"):
        headers = {"Content-Type": "application/json"}
        answer = shared.post(f"/v1/{path}", content=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_is_429_with_the_time_to_come_back(shared: RunningServer) -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(f"{shared.url}/v1/completions", json={**LONG, "max_tokens": 200})

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=LIMIT_S) as client:
            return await asyncio.gather(*(ask(client) for _ in range(24)))

    answers = asyncio.run(run())
    served, refused = ([each for each in answers if each.status_code == status] for status in (200, 429))
    assert len(served) + len(refused) == 24 and len(served) >= 4 and refused
    assert all(each.json()["usage"]["completion_tokens"] == 200 for each in served)
    assert all(1 <= int(each.headers["Retry-After"]) <= 60 for each in refused)
    until_idle(shared)


def test_a_request_id_comes_back(shared: RunningServer) -> None:
    assert shared.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert shared.post("/v1/nothing").headers["x-request-id"]


def test_other_origins_are_refused_by_default(shared: RunningServer) -> None:
    headers = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{shared.url}/v1/completions", headers=headers).headers


def test_a_lower_priority_value_goes_first(shared: RunningServer) -> None:
    """In the order of the server's log: which client hears of its answer first is luck."""
    lengths = {
        31: 5,
        32: 5,
        33: -1,
        34: 0,
    }  # priorities by the lengths of prompts, which tell requests apart in the log

    def ask(length: int) -> None:
        body = {**LONG, "prompt": [1] * length, "max_tokens": 150 if lengths[length] == 5 else 100}
        shared.post("/v1/completions", json={**body, "priority": lengths[length]})

    with ThreadPoolExecutor(len(lengths)) as pool, ExitStack() as running:
        for _ in range(2):
            stream = httpx.stream(
                "POST", f"{shared.url}/v1/completions", json={**LONG, "stream": True}, timeout=LIMIT_S
            )
            running.enter_context(stream)
        until(shared, "num_requests_running", 2)
        for count, length in enumerate(lengths, start=1):
            pool.submit(ask, length)
            until(shared, "num_requests_waiting", count)
    wait_until(lambda: all(logged(shared, length) for length in lengths), "a request is not logged")
    entries = [json.loads(line)["prompt_tokens"] for line in shared.lines if line.startswith("{")]
    assert {lengths[length] for length in [each for each in entries if each in lengths][:2]} == {-1, 0}
    until_idle(shared)


def test_keys_deadlines_origins_and_texts_in_the_log(model: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    chosen = options(api_keys_file=keys, request_timeout_s=3, allowed_origins="http://here")
    with running_server(model, *chosen, "--log-requests", "--log-texts", env={"SARATHI_API_KEYS": "third,"}) as server:

        def status(path: str = "/v1/models", **headers: str) -> int:
            return server.get(path, headers=headers).status_code

        assert status() == status(Authorization="Bearer wrong") == status(Authorization="Bearer") == 401
        assert [status(Authorization=f"Bearer {key}") for key in ("first", "second", "third")] == [200] * 3
        assert status(**{"x-api-key": "first"}) == 200
        assert [status(path) for path in ("/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json")] == [
            200
        ] * 6
        origin = {"Origin": "http://here", "Access-Control-Request-Method": "POST"}
        preflight = httpx.options(f"{server.url}/v1/completions", headers=origin)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "http://here")
        bearer = {"Authorization": "Bearer first"}
        completions = f"{server.url}/v1/completions"
        late = httpx.post(completions, json=LONG, headers=bearer, timeout=LIMIT_S)
        assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
        streamed = httpx.post(completions, json={**LONG, "stream": True}, headers=bearer, timeout=LIMIT_S)
        assert streamed.status_code == 200 and "within 3 s" in streamed.text.strip().rpartition("\n\n")[2]
        until_idle(server)
        check_log(server, max_tokens=2, **bearer)
        assert "secret words" in "".join(server.lines)
        assert server.end() == 0


def test_requests_are_logged_without_their_texts(shared: RunningServer) -> None:
    check_log(shared, max_tokens=800)
    assert "secret words" not in "".join(shared.lines)
    status = re.compile(r"running 1, waiting 0, KV cache \d+\.\d% used, \d+\.\d% retained, ")
    assert any(map(status.match, shared.lines))


def check_log(server: RunningServer, max_tokens: int, **headers: str) -> None:
    """A request becomes a JSON object among the printed lines."""
    body = {"prompt": "secret words", "max_tokens": max_tokens, "ignore_eos": True}
    assert server.post("/v1/completions", json=body, headers=headers).status_code == 200
    wait_until(lambda: logged(server, prompt_tokens=12) is not None, "the request is not logged")
    entry = logged(server, prompt_tokens=12)
    assert entry is not None
    assert entry["completions"][0]["tokens"] == max_tokens
    assert 0 <= entry["queue_s"] <= entry["ttft_s"] <= entry["e2e_s"]


def logged(server: RunningServer, prompt_tokens: int) -> dict | None:
    entries = [json.loads(line) for line in server.lines if line.startswith("{")]
    return next((each for each in entries if each["prompt_tokens"] == prompt_tokens), None)


# Signals.


def test_sigterm_lets_requests_end_and_refuses_new_ones(model: str) -> None:
    with running_server(model, *PATIENT) as server:
        stream = OpenStream(server, max_tokens=1000)
        with stopped(children(server.process.pid)):
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.get("/ready").status_code == 503, "the server does not drain")
            refused = server.post("/v1/completions", json=SHORT)
            assert refused.status_code == 503 and "draining" in refused.json()["error"]["message"]
            assert server.get("/health").status_code == 200
        assert stream.last() == "[DONE]" and server.process.wait(LIMIT_S) == 0


def test_requests_that_do_not_end_in_time_are_told(model: str) -> None:
    with running_server(model, *options(shutdown_timeout_s=0.3)) as server:
        stream = OpenStream(server)
        [core] = children(server.process.pid)
        assert server.end() == 0
        assert "shut down before" in json.loads(stream.last())["error"]["message"]
        assert not is_alive(core)


def test_a_second_signal_ends_at_once(model: str) -> None:
    with running_server(model) as server:
        stream = OpenStream(server)
        [core] = children(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/ready").status_code == 503, "the server does not drain")
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT
        with pytest.raises(httpx.HTTPError):
            stream.last()
        wait_until(lambda: not is_alive(core), "the core process is left")


def asking(server: RunningServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=LIMIT_S)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_death_of_the_engine_is_told_and_ends_the_server(model: str, number: signal.Signals) -> None:
    """The server tells it for five seconds, in which a client that is there already asks twice."""
    with running_server(model, *options(heartbeat_timeout_s=3)) as server, asking(server) as client:
        stream = OpenStream(server)
        [core] = children(server.process.pid)
        os.kill(core, number)
        wait_until(lambda: client.get("/health").status_code == 503, "the death is not told")
        assert client.post("/v1/completions", json=SHORT).status_code == 503
        assert "the core process" in json.loads(stream.last())["error"]["message"]
        assert server.process.wait(LIMIT_S) == 1 and not is_alive(core)


def test_a_signal_while_the_model_is_loaded_ends_the_start(model: str) -> None:
    words = (sys.executable, "-m", "sarathi", "serve", model, "--port", "0", "--load-format", "dummy")
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_until(lambda: bool(children(process.pid)), "no core process starts")
    cores = children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 0 and not is_alive(cores[0])


def test_a_taken_port_is_told_before_the_model_is_loaded(shared: RunningServer, model: str) -> None:
    port = shared.url.rpartition(":")[2]
    taken = pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use")
    with taken, running_server(model, "--port", port):
        pass
