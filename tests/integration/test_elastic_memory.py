"""The cache of a running engine shrinks, grows, sleeps and wakes: no request is lost, and memory is the system's."""

import threading
import time
from pathlib import Path

import httpx
import pytest
from http_server import options, running_server
from small_models import save_tiny_model
from test_server_life import LONG, OpenStream, metric, until

from sarathi import LLM, SamplingParams

ADMIN = {"Authorization": "Bearer admin"}
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SETTINGS = {"load_format": "dummy", "device": "cpu", "attention_backend": "sdpa_vattn", "memory_bytes": "16mb"}
PROMPTS = [[number, 5, 6, 7] for number in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192)


def texts(llm: LLM) -> list[list[int]]:
    return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def row_bytes(llm: LLM) -> int:
    facts = llm.engine.core.facts
    return facts.token_bytes * facts.capacity.page_bytes // facts.capacity.token_bytes


def test_an_engine_that_sleeps_in_the_middle_gives_the_same_tokens(model: str) -> None:
    with LLM(model, **SETTINGS) as llm:
        expected = texts(llm)
        outputs = {}
        for count, (number, output) in enumerate(llm.stream_all(PROMPTS, GREEDY)):
            outputs[number] = output
            if count in (20, 200):
                llm.sleep()
                assert llm.memory_stats().created_bytes <= row_bytes(llm)
                threading.Timer(0.1, llm.wake_up).start()
        assert [outputs[number].outputs[0].token_ids for number in range(len(PROMPTS))] == expected
        llm.engine.core.executor.check_integrity()


def test_a_budget_that_shrinks_and_grows_gives_the_same_tokens(model: str) -> None:
    with LLM(model, **SETTINGS) as llm:
        expected, outputs, core = texts(llm), {}, llm.engine.core
        for count, (number, output) in enumerate(llm.stream_all(PROMPTS, GREEDY)):
            outputs[number] = output
            if count == 30:
                core.set_cache_budget(2 * row_bytes(llm))
            if count == 100:
                assert llm.memory_stats().created_bytes <= 2 * row_bytes(llm) and core.scheduler.num_preemptions > 0
            if count == 200:
                core.set_cache_budget(64 * row_bytes(llm))
        assert [outputs[number].outputs[0].token_ids for number in range(len(PROMPTS))] == expected
        assert core.scheduler.block_space_manager.capacity.rows == 64
        core.executor.check_integrity()


@pytest.mark.parametrize(("memory_bytes", "message"), [(1, "at least"), (0, "at least")])
def test_a_budget_without_a_row_is_refused(model: str, memory_bytes: int, message: str) -> None:
    with LLM(model, **SETTINGS) as llm, pytest.raises(ValueError, match=message):
        llm.engine.core.set_cache_budget(memory_bytes)


def test_paged_memory_cannot_change(model: str) -> None:
    paged = {**SETTINGS, "attention_backend": "sdpa_paged_16"}
    with LLM(model, **paged) as llm, pytest.raises(ValueError, match="only the budget of virtual memory"):
        llm.engine.core.set_cache_budget(2**20)


def test_a_server_sleeps_wakes_and_shrinks_for_an_admin_alone(model: str, tmp_path: Path) -> None:
    chosen = options(attention_backend="sdpa_vattn", max_num_seqs=4)
    with running_server(model, *chosen, env={"SARATHI_ADMIN_KEYS": "admin"}) as server:

        def post(path: str, headers: dict[str, str] = ADMIN, **body: object) -> int:
            return httpx.post(server.url + path, json=body or None, headers=headers, timeout=20).status_code

        assert post("/sleep", {}) == post("/kv/budget", {}, memory_bytes=2**22) == 403
        stream = OpenStream(server, max_tokens=4000)
        assert post("/sleep") == 200
        assert metric(server, "kv_cache_created_bytes") <= 2**18  # a row
        num_lines = len(stream.lines)
        time.sleep(0.5)
        assert len(stream.lines) <= num_lines + 1 and not stream.done.done()
        assert post("/wake_up") == 200
        assert post("/kv/budget", memory_bytes=2**22) == 200
        assert post("/kv/budget", memory_bytes=1) == 400 and post("/sleep?level=2") == 400
        assert stream.last() == "[DONE]"
        assert metric(server, "kv_cache_created_bytes") <= 2**22
        until(server, "num_requests_running", 0)
        done = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 5}, timeout=60)
        assert done.json()["usage"]["completion_tokens"] == 5
