"""A server under load and under clients that mean no good: right text, every request answered, nothing kept."""

import asyncio
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_server import LIMIT_S, RunningServer, metric, options, running_server, wait_until
from process_tree import children
from small_models import save_tiny_model
from test_server_life import until_idle

from sarathi import LLM, SamplingParams
from sarathi.engine.outputs import CompletionOutput

pytestmark = pytest.mark.slow
NUM_REQUESTS, CAPACITY = 200, 50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048)
    with running_server(model, *options(max_num_seqs=4, max_waiting_requests=CAPACITY - 4)) as server:
        yield server


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def num_decided(output: CompletionOutput) -> int:
    """Greedy tokens before the first one that another nearly equals: rounding differs with the batch, and chooses."""
    gaps = [abs(first.logprob - second.logprob) for first, second in map(dict.values, output.logprobs or [])]
    return next((at for at, gap in enumerate(gaps) if gap < 0.01), len(gaps))


def test_text_under_load_is_that_of_generate() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    questions = ["Write 'good morning' in Japanese:", "Ein Satz über Äpfel:", "1, 2, 3,", "🙂🙂🙃", "def f(x):", "世界"]
    prompts = [f"{rng.choice(questions)} {rng.randint(0, 99)}" for _ in range(12)]
    with LLM("smollm2-135m", max_model_len=256, device="cpu", memory_bytes="64mb") as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
        counts = [num_decided(each.outputs[0]) for each in llm.generate(prompts, params, use_tqdm=False)]
        prompts = [prompt for prompt, count in zip(prompts, counts, strict=True) if count]
        limits = [min(rng.randint(5, 24), count) for count in counts if count]
        params = [SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True) for limit in limits]
        plain = [each.outputs[0].text for each in llm.generate(prompts, params, use_tqdm=False)]
        stops = [text[len(text) // 2 :][:3] if rng.random() < 0.5 else None for text in plain]
        params = [
            SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True, stop=stop or ())
            for limit, stop in zip(limits, stops, strict=True)
        ]
        expected = [each.outputs[0].text for each in llm.generate(prompts, params, use_tqdm=False)]

    async def ask(client: httpx.AsyncClient, number: int) -> str:
        body = {"prompt": prompts[number], "max_tokens": limits[number], "stop": stops[number] or None}
        stream = number % 2 == 0
        asked = {**body, "temperature": 0, "ignore_eos": True, "stream": stream}
        answer = await client.post("/v1/completions", json=asked)
        if not stream:
            return answer.json()["choices"][0]["text"]
        chunks = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: {")]
        return "".join(httpx.Response(200, text=chunk).json()["choices"][0]["text"] for chunk in chunks)

    async def run(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(len(prompts))))

    with running_server("smollm2-135m", *options(max_model_len=256, max_num_seqs=8)) as server:
        got = asyncio.run(run(server.url))
        wrong = [number for number, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]]
        assert not wrong, [(prompts[number], got[number], expected[number]) for number in wrong]


def test_requests_beyond_the_capacity_are_refused_and_nothing_hangs(tiny: RunningServer) -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        body = {"prompt": [1, 2, 3], "max_tokens": 30, "ignore_eos": True}
        return await client.post(f"{tiny.url}/v1/completions", json=body)

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=LIMIT_S, limits=httpx.Limits(max_connections=NUM_REQUESTS)) as client:
            return await asyncio.gather(*(ask(client) for _ in range(NUM_REQUESTS)))

    answers = asyncio.run(run())
    served = [each for each in answers if each.status_code == 200]
    assert len(served) >= CAPACITY - 4 and {each.status_code for each in answers} == {200, 429}
    assert all(each.json()["usage"]["completion_tokens"] == 30 for each in served)
    until_idle(tiny)


def test_a_thousand_connections_that_break_off_leave_nothing(tiny: RunningServer) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    port, pid = int(tiny.url.rpartition(":")[2]), tiny.process.pid
    body = b'{"prompt": [1, 2, 3], "max_tokens": 2000, "ignore_eos": true, "stream": true}'
    whole = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (
            len(body),
            body,
        )
    )

    def break_off() -> None:
        sent = rng.choice([b"", b"GET", whole, whole[: rng.randrange(len(whole))], rng.randbytes(200), b"[" * 5000])
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as client:
            client.sendall(sent)

    for _ in range(100):
        break_off()
    until_idle(tiny)
    files, memory = open_files(pid), [resident_bytes(each) for each in (pid, *children(pid))]
    for _ in range(1000):
        break_off()
    until_idle(tiny)
    wait_until(lambda: open_files(pid) <= files + 5, "connections are open")
    after = [resident_bytes(each) for each in (pid, *children(pid))]
    assert all(new < old + 2**25 for new, old in zip(after, memory, strict=True)), (memory, after)
    assert metric(tiny, "kv_cache_usage_perc") == 0 and tiny.get("/health").status_code == 200


def test_large_bodies_and_deep_json_are_refused_and_forgotten(tiny: RunningServer) -> None:
    pid = tiny.process.pid
    headers = {"Content-Type": "application/json"}
    bodies = [
        b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
        b'{"prompt": [' + b"null," * 2_000_000 + b"null]}",
        b"[" * 10**6,
    ]

    def send() -> None:
        for body in bodies:
            answer = tiny.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400

    for _ in range(3):
        send()
    memory = resident_bytes(pid)
    for _ in range(5):
        send()
    assert resident_bytes(pid) < memory + 2**26 and tiny.get("/health").status_code == 200


def test_no_request_of_the_published_schema_is_an_error_of_the_server(tiny: RunningServer) -> None:
    words = (
        "run",
        f"{tiny.url}/openapi.json",
        "--checks",
        "not_a_server_error",
        "--max-examples",
        "15",
        "--phases",
        "fuzzing",
    )
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--request-timeout", "60"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    until_idle(tiny)
