"""`sarathi serve --prefill-decode` and AsyncLLM over two engines: texts, ends of requests and of engines, memory."""

import asyncio
import os
import random
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest
from http_server import LIMIT_S, LONG, RunningServer, metric, options, running_server, wait_until
from process_tree import children, descendants, is_alive, stopped
from test_server_life import PATIENT, OpenStream, until_idle

from sarathi import LLM, SamplingParams
from sarathi.config.load import make_config
from sarathi.engine.async_llm import AsyncLLM

ADMIN = {"Authorization": "Bearer admin"}
MEMORY_BYTES = 64 * 2**20
BACKEND = "sdpa_vattn_4kb"
ROW_BYTES = 4 * 4096  # a page in each of two regions for each of two layers
PAIR = ("--prefill-decode", *options(prefill_chunk_size=32, attention_backend=BACKEND, max_num_seqs=6))
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def pair(model: str) -> Iterator[RunningServer]:
    with running_server(model, *PAIR, env={"SARATHI_ADMIN_KEYS": "admin"}) as server:
        yield server


@pytest.fixture(scope="module")
def one(model: str) -> Iterator[LLM]:
    with LLM(model, device="cpu", attention_backend=BACKEND, memory_bytes=MEMORY_BYTES) as llm:
        yield llm


def prompts_of(seed: int, count: int = 8, longest: int = 150) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(256), k=rng.randint(1, longest)) for _ in range(count)]


def complete(server: RunningServer, prompt: list[int], **body: object) -> httpx.Response:
    fields = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{server.url}/v1/completions", json=fields, timeout=LIMIT_S)


def post(server: RunningServer, path: str, **body: object) -> int:
    return httpx.post(server.url + path, json=body or None, headers=ADMIN, timeout=LIMIT_S).status_code


def is_healthy(server: RunningServer) -> bool:
    """The server tells of its engine's death for five seconds, which a busy machine may miss."""
    try:
        return server.get("/health").status_code != 503
    except httpx.TransportError:
        return server.process.poll() is None


def until_nothing_is_held(server: RunningServer) -> None:
    """By either engine."""
    until_idle(server)
    wait_until(lambda: metric(server, "kv_cache_usage_perc") == 0, "rows are in use")


def test_texts_streams_and_stop_strings_are_those_of_one_engine(pair: RunningServer, one: LLM) -> None:
    prompts = prompts_of(1)
    expected = [each.outputs[0] for each in one.generate(prompts, GREEDY, use_tqdm=False)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(pair, prompt, n=2).json(), prompts))
        streams = list(pool.map(lambda prompt: complete(pair, prompt, stream=True).text, prompts))
    for answer, stream, output in zip(answers, streams, expected, strict=True):
        assert [choice["text"] for choice in answer["choices"]] == [output.text] * 2
        assert stream.count("data: ") >= 2 and stream.rstrip().endswith("data: [DONE]")
        deltas = [
            httpx.Response(200, text=line[6:]).json() for line in stream.splitlines() if line.startswith("data: {")
        ]
        assert "".join(choice["text"] for each in deltas for choice in each["choices"]) == output.text
    prompt, text = next((prompt, each.text) for prompt, each in zip(prompts, expected, strict=True) if each.text)
    [choice] = complete(pair, prompt, stop=[text[-1]]).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text.partition(text[-1])[0], "stop")
    until_nothing_is_held(pair)


@pytest.mark.parametrize("length", [3, 20_000])
def test_a_client_that_leaves_frees_memory_on_both_engines(pair: RunningServer, length: int) -> None:
    """While its output is decoded, or while its prompt is computed."""
    until_nothing_is_held(pair)
    body = {**LONG, "prompt": [5] * length, "max_tokens": 10_000, "stream": True}
    with httpx.stream("POST", f"{pair.url}/v1/completions", json=body, timeout=LIMIT_S) as response:
        lines = response.iter_lines()  # its end would close the connection
        if length == 3:
            next(lines)
        wait_until(lambda: metric(pair, "kv_cache_usage_perc") > 0, "no memory is in use")
    until_nothing_is_held(pair)
    assert complete(pair, [1, 2, 3]).status_code == 200


def test_a_request_that_fails_does_so_alone(pair: RunningServer, one: LLM) -> None:
    prompts = prompts_of(3, 4)
    expected = [each.outputs[0].text for each in one.generate(prompts, GREEDY, use_tqdm=False)]
    with ThreadPoolExecutor(6) as pool:
        good = [pool.submit(complete, pair, prompt) for prompt in prompts]
        limits = {"structured_outputs": {"regex": "a"}, "allowed_token_ids": [5], "ignore_eos": False}
        empty = pool.submit(complete, pair, prompts[0], **limits)
        long = pool.submit(complete, pair, [1] * 40_000)
    assert [each.result().json()["choices"][0]["text"] for each in good] == expected
    assert "no token can be chosen" in empty.result().text
    assert long.result().status_code == 400 and "40000 tokens" in long.result().text
    until_nothing_is_held(pair)


def test_metrics_and_stats_are_of_both_engines(pair: RunningServer) -> None:
    complete(pair, [7] * 100)
    until_nothing_is_held(pair)
    stats = httpx.get(f"{pair.url}/stats", timeout=LIMIT_S).json()
    assert stats["total_rows"] == 2 * MEMORY_BYTES // ROW_BYTES
    assert stats["mapped_bytes"] >= 4 * ROW_BYTES  # of retained prompts, on either side
    assert metric(pair, "kv_cache_created_bytes") == stats["created_bytes"]
    assert metric(pair, "kv_cache_mapping_calls_total") > 0


def test_prompts_that_begin_alike_are_computed_once_until_the_cache_is_reset(pair: RunningServer) -> None:
    def cached(prompt: list[int]) -> int:
        found: int = complete(pair, prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    [prompt] = prompts_of(5, 1)
    prompt = (prompt * 200)[:200]
    assert cached(prompt) == 0
    until_nothing_is_held(pair)
    assert 100 < cached(prompt) < 200 and metric(pair, "prefix_cache_hits_total") > 100
    until_nothing_is_held(pair)
    body = {**LONG, "stream": True}
    with httpx.stream("POST", f"{pair.url}/v1/completions", json=body, timeout=LIMIT_S) as response:
        lines = response.iter_lines()  # its end would close the connection
        next(lines)
        assert post(pair, "/reset_prefix_cache") == 409
    until_nothing_is_held(pair)
    wait_until(lambda: post(pair, "/reset_prefix_cache") == 200, "the cache is not reset")
    assert cached(prompt) == 0


def test_both_engines_sleep_wake_and_shrink(pair: RunningServer, one: LLM) -> None:
    prompts = prompts_of(6, 3)
    params = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    expected = [each.outputs[0].text for each in one.generate(prompts, params, use_tqdm=False)]
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(complete, pair, prompt, max_tokens=300) for prompt in prompts]
        wait_until(
            lambda: metric(pair, "num_requests_running") == 3 or all(each.done() for each in asked), "they do not run"
        )
        assert post(pair, "/sleep") == 200
        assert metric(pair, "kv_cache_created_bytes") <= 2 * ROW_BYTES
        assert post(pair, "/wake_up") == 200
        assert post(pair, "/kv/budget", memory_bytes=2**20) == 200
        answers = [each.result().json()["choices"][0]["text"] for each in asked]
    assert answers == expected
    until_nothing_is_held(pair)
    assert metric(pair, "kv_cache_created_bytes") <= 2**20
    assert httpx.get(f"{pair.url}/stats", timeout=LIMIT_S).json()["total_rows"] == 2**20 // ROW_BYTES
    assert post(pair, "/kv/budget", memory_bytes=ROW_BYTES) == 400
    assert post(pair, "/sleep?level=2") == 200 and post(pair, "/wake_up") == 200
    assert post(pair, "/kv/budget", memory_bytes=2 * MEMORY_BYTES) == 200
    assert complete(pair, prompts[0], max_tokens=5).json()["usage"]["completion_tokens"] == 5


@pytest.mark.slow
def test_sigterm_lets_requests_end_on_both_engines(model: str) -> None:
    with running_server(model, *PAIR, *PATIENT) as server:
        stream = OpenStream(server, max_tokens=500, prompt=[5] * 200)
        below = descendants(server.process.pid)
        with stopped(children(server.process.pid)):
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.get("/ready").status_code == 503, "it takes requests")
            assert complete(server, [1]).status_code == 503
        assert stream.last() == "[DONE]" and server.process.wait(LIMIT_S) == 0
        assert len(below) >= 3 and not any(map(is_alive, below))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "how", "end"), [(0, signal.SIGKILL, "was ended by SIGKILL"), (1, signal.SIGSTOP, "hangs")]
)
def test_an_engine_of_the_pair_that_dies_or_hangs_ends_the_server(
    model: str, index: int, how: signal.Signals, end: str
) -> None:
    with running_server(model, *PAIR) as server:
        stream = OpenStream(server)
        [core] = children(server.process.pid)
        below = descendants(server.process.pid)
        killed = sorted(children(core))[index]
        os.kill(killed, how)
        prompt = ThreadPoolExecutor(1).submit(complete, server, [5] * 100)  # which needs both
        assert re.search(rf"(prefill|decode) rank 0 of 1 \(process {killed}\) {end}", stream.last())
        wait_until(lambda: not is_healthy(server), "it says that it is healthy")
        assert prompt.result().status_code in (500, 503)
        assert server.process.wait(LIMIT_S) == 1
        wait_until(lambda: not any(map(is_alive, below)), "processes are left")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_an_engine_of_the_pair_that_hangs_without_work_ends_the_server(model: str, index: int) -> None:
    with running_server(model, *PAIR) as server:
        [core] = children(server.process.pid)
        below = descendants(server.process.pid)
        stopped = sorted(children(core))[index]
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: not is_healthy(server), "it says that it is healthy")
        assert server.process.wait(LIMIT_S) == 1
        wait_until(lambda: not any(map(is_alive, below)), "processes are left")
        assert re.search(rf"(prefill|decode) rank 0 of 1 \(process {stopped}\) hangs", "".join(server.lines))


@pytest.mark.slow
def test_nothing_outlives_a_server_that_is_killed_also_where_it_is_stopped(model: str) -> None:
    with running_server(model, *PAIR) as server:
        below = descendants(server.process.pid)
        for each in below:
            os.kill(each, signal.SIGSTOP)
        server.process.kill()
        wait_until(lambda: not any(map(is_alive, below)), "processes are left")


@pytest.mark.slow
def test_ranks_may_be_actors(model: str, one: LLM) -> None:
    """Of a Ray that the server starts; a rank that is stopped without work ends it, and nothing of Ray is left."""
    prompts = prompts_of(9)
    expected = [each.outputs[0].text for each in one.generate(prompts, GREEDY, use_tqdm=False)]
    with running_server(model, *PAIR, "--executor", "ray", env={"RAY_ADDRESS": "local"}) as server:
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: complete(server, prompt).json(), prompts))
        assert [each["choices"][0]["text"] for each in answers] == expected
        until_nothing_is_held(server)
        below = descendants(server.process.pid)
        ranks = [pid for pid in below if b"RankActor" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(ranks[0], signal.SIGSTOP)
        wait_until(lambda: not is_healthy(server), "it says that it is healthy")
        assert server.process.wait(LIMIT_S) == 1
        wait_until(lambda: not any(map(is_alive, below)), "processes are left")
        assert len(ranks) == 2 and f"(process {ranks[0]} on " in "".join(server.lines)


@pytest.mark.slow
def test_async_llm_over_two_engines(model: str, one: LLM) -> None:
    prompts = prompts_of(8)
    expected = [list(each.outputs[0].token_ids) for each in one.generate(prompts, GREEDY, use_tqdm=False)]
    config = make_config(
        model=model, device="cpu", attention_backend=BACKEND, memory_bytes=MEMORY_BYTES,
        prefill_decode=True, prefill_chunk_size=32,
    )  # fmt: skip

    async def tokens_of(llm: AsyncLLM, prompt: list[int]) -> list[int]:
        async for output in llm.generate(prompt, GREEDY):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    async def leave(llm: AsyncLLM, num_outputs: int) -> None:
        async with aclosing(llm.generate([5] * 5000, SamplingParams(max_tokens=5000))) as outputs:
            for _ in range(num_outputs):
                await anext(outputs)

    async def run() -> list[list[int]]:
        llm = await AsyncLLM.start(config)
        try:
            left = [asyncio.create_task(leave(llm, number)) for number in (0, 1, 5)]
            found = await asyncio.gather(*[tokens_of(llm, prompt) for prompt in prompts], *left)
            with pytest.raises(ValueError, match="the longest that can run has 32767"):
                await llm.submit([1] * 40_000)
            for _ in range(600):
                if not (await llm.stats()).used_rows:
                    break
                await asyncio.sleep(0.1)
            assert not (await llm.stats()).used_rows and not llm.num_unfinished
        finally:
            await llm.shutdown()
        return list(found[: len(prompts)])

    before = set(descendants(os.getpid()))
    assert asyncio.run(run()) == expected
    assert set(descendants(os.getpid())) <= before
