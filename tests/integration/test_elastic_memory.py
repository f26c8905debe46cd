"""The cache of a running engine shrinks, grows, sleeps and wakes: no request is lost, and memory is the system's."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from http_server import LONG, metric, options, running_server
from small_models import save_tiny_model
from test_server_life import OpenStream, until
from transformers import LlamaConfig, LlamaForCausalLM

from sarathi import LLM, SamplingParams

ADMIN = {"Authorization": "Bearer admin"}
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SETTINGS = {"device": "cpu", "attention_backend": "sdpa_vattn", "memory_bytes": "16mb"}
PROMPTS = [[number, 5, 6, 7] for number in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192)


def texts(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, params, use_tqdm=False)]


def save_random_weights(folder: Path) -> tuple[str, int]:
    """A model of 64 MB, and its size in memory, which shows beside the noise of an allocator."""
    torch.manual_seed(random.randrange(2**31))
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, **shape))
    model.save_pretrained(folder)
    return str(folder), 4 * model.num_parameters()


def resident_bytes() -> int:
    """Of this process, without the pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(status.partition(f"{kind}:")[2].split()[0]) for kind in ("RssAnon", "RssShmem"))


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


@pytest.mark.parametrize("mapped_weights", [False, True])
def test_an_engine_without_weights_takes_no_memory_for_them_and_reads_them_again(
    tmp_path: Path, mapped_weights: bool
) -> None:
    model, num_bytes = save_random_weights(tmp_path / "model")
    few = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(model, **SETTINGS, mapped_weights=mapped_weights) as llm:
        expected, outputs = texts(llm, few), {}
        for count, (number, output) in enumerate(llm.stream_all(PROMPTS, few)):
            outputs[number] = output
            if count == 20:
                llm.sleep(level=1)
                before = resident_bytes()
                llm.sleep(level=2)
                assert before - resident_bytes() > 0.9 * num_bytes
                threading.Timer(0.1, llm.wake_up).start()
        assert [outputs[number].outputs[0].token_ids for number in range(len(PROMPTS))] == expected
        llm.sleep(level=2)
        weights = Path(model) / "model.safetensors"
        hidden = weights.rename(weights.with_suffix(".hidden"))
        with pytest.raises(ValueError, match=str(tmp_path)):
            llm.wake_up()
        assert llm.engine.core.is_asleep
        hidden.rename(weights)
        llm.wake_up()
        assert texts(llm, few) == expected
        with pytest.raises(ValueError, match=r"level is 3: it must be 1 .release the cache. or 2"):
            llm.sleep(level=3)


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
    with LLM(model, **paged) as llm, pytest.raises(ValueError, match="the budget of a paged cache cannot change"):
        llm.engine.core.set_cache_budget(2**20)


def test_a_server_sleeps_wakes_and_shrinks_for_an_admin_alone(model: str, tmp_path: Path) -> None:
    chosen = options(attention_backend="sdpa_vattn", max_num_seqs=4)
    with running_server(model, *chosen, env={"SARATHI_ADMIN_KEYS": "admin"}) as server:

        def post(path: str, headers: dict[str, str] = ADMIN, **body: object) -> int:
            return server.post(path, json=body or None, headers=headers).status_code

        assert post("/sleep", {}) == post("/kv/budget", {}, memory_bytes=2**22) == 403
        stream = OpenStream(server, max_tokens=4000)
        assert post("/sleep") == 200
        assert metric(server, "kv_cache_created_bytes") <= 2**18  # a row
        num_tokens = metric(server, "generation_tokens_total")
        time.sleep(0.5)
        assert metric(server, "generation_tokens_total") == num_tokens and not stream.done.done()
        assert post("/wake_up") == 200
        assert post("/kv/budget", memory_bytes=2**22) == 200
        assert post("/kv/budget", memory_bytes=1) == 400 and post("/sleep?level=3") == 400
        assert post("/sleep?level=2") == 200 and post("/wake_up") == 200
        assert stream.last() == "[DONE]"
        assert metric(server, "kv_cache_created_bytes") <= 2**22
        until(server, "num_requests_running", 0)
        done = server.post("/v1/completions", json={**LONG, "max_tokens": 5})
        assert done.json()["usage"]["completion_tokens"] == 5
