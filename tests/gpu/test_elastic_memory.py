"""A cache on a GPU that sleeps, wakes, shrinks and is shared: captured graphs stay right, and memory is the GPU's.

Free memory of the GPU is measured: run it without other processes there.
"""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")
from http_server import options, running_server, wait_until
from likely import check_likely, prompts, save_llama
from test_budget_group import MAX_TOKENS, NUM_REQUESTS, answer, total_rows

from sarathi import LLM, SamplingParams
from sarathi.worker.cuda_graphs import DecodeGraph

pytestmark = pytest.mark.gpu
BACKENDS = ("fa_vattn", "fa_vattn_megacache")
PARAMS = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
CACHE_BYTES = 1 << 30
LARGE = {  # 0.6 GB in bfloat16, most of it in mapped extents of every size
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_are_right_after_a_sleep_in_the_middle(folder: str, backend: str) -> None:
    """The cache goes back to the GPU; weights that are not mapped stay, since graphs have their addresses."""
    with LLM(folder, attention_backend=backend, memory_bytes=CACHE_BYTES, chunk_size=256) as llm:
        outputs = {}
        for count, (number, output) in enumerate(llm.stream_all(prompts(), PARAMS)):
            outputs[number] = list(output.outputs[0].token_ids)
            if count in (20, 200):
                before, held = free_bytes(), llm.memory_stats().created_bytes
                llm.sleep()
                left = llm.memory_stats().created_bytes
                assert left < held and free_bytes() - before >= held - left
                threading.Timer(0.1, llm.wake_up).start()
        llm.engine.core.executor.check_integrity()
        with pytest.raises(ValueError, match="level is 2: weights on cuda cannot be released"):
            llm.sleep(level=2)
    check_likely(folder, [outputs[number] for number in range(len(outputs))], backend)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Grows by one with each call of a DecodeGraph's method."""
    calls, method = [], getattr(DecodeGraph, name)

    def counted(*arguments: Any) -> Any:
        calls.append(name)
        return method(*arguments)

    monkeypatch.setattr(DecodeGraph, name, counted)
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_are_right_with_weights_that_are_read_again(
    folder: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures, replays = count_calls(monkeypatch, "capture"), count_calls(monkeypatch, "replay")
    with LLM(
        folder, attention_backend=backend, memory_bytes=CACHE_BYTES, chunk_size=256, mapped_weights=True
    ) as llm:  # fmt: skip
        num_captures, num_replays, outputs = len(captures), 0, {}
        for count, (number, output) in enumerate(llm.stream_all(prompts(), PARAMS)):
            outputs[number] = list(output.outputs[0].token_ids)
            if count in (20, 200):
                num_replays = len(replays)
                llm.sleep(level=2)
                threading.Timer(0.1, llm.wake_up).start()
        llm.engine.core.executor.check_integrity()
    assert num_captures and len(captures) == num_captures and len(replays) > num_replays > 0
    check_likely(folder, [outputs[number] for number in range(len(outputs))], backend)


def test_mapped_weights_leave_the_gpu_and_come_back_at_their_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    captures, replays = count_calls(monkeypatch, "capture"), count_calls(monkeypatch, "replay")
    with LLM(
        str(tmp_path), load_format="dummy", attention_backend=BACKENDS[0], memory_bytes=CACHE_BYTES,
        mapped_weights=True, prefix_caching=False,
    ) as llm:  # fmt: skip
        model, num_captures = llm.engine.core.executor.model, len(captures)
        weights = dict(model.parameters())
        copies = {name: tensor.cpu() for name, tensor in weights.items()}
        addresses = {name: tensor.data_ptr() for name, tensor in weights.items()}
        num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in weights.values())
        arena = model.place.arena
        expected = [list(each.outputs[0].token_ids) for each in llm.generate(prompts(), PARAMS, use_tqdm=False)]
        for _ in range(2):
            llm.sleep(level=1)
            before, num_replays = free_bytes(), len(replays)
            llm.sleep(level=2)
            given_back = free_bytes() - before
            print(f"{num_bytes} bytes of weights, {given_back} given back")
            assert given_back >= num_bytes - arena.page_bytes > 600_000_000
            llm.wake_up()
            assert {name: tensor.data_ptr() for name, tensor in model.parameters()} == addresses
            assert all(weights[name].cpu().equal(copy) for name, copy in copies.items())
            outputs = [list(each.outputs[0].token_ids) for each in llm.generate(prompts(), PARAMS, use_tqdm=False)]
            assert outputs == expected
            assert num_captures and len(captures) == num_captures and len(replays) > num_replays
        arena.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_budget_shrinks_and_grows_under_load(folder: str, backend: str) -> None:
    with LLM(folder, attention_backend=backend, memory_bytes=CACHE_BYTES, chunk_size=256) as llm:
        core, outputs = llm.engine.core, {}
        least = core.facts.num_cache_tokens * core.facts.token_bytes // core.facts.capacity.rows * 2
        for count, (number, output) in enumerate(llm.stream_all(prompts(), PARAMS)):
            outputs[number] = list(output.outputs[0].token_ids)
            if count == 30:
                core.set_cache_budget(least)
            if count == 100:
                assert llm.memory_stats().created_bytes <= least and core.scheduler.num_preemptions > 0
            if count == 200:
                core.set_cache_budget(CACHE_BYTES)
        core.executor.check_integrity()
    check_likely(folder, [outputs[number] for number in range(len(outputs))], backend)


def test_two_servers_share_one_gpu(folder: str, tmp_path: Path) -> None:
    """One has a peak, then both; one is killed, and its memory is the other's."""
    pytest.importorskip("fastapi", reason="servers need sarathi-vattention[server]")
    env = {"XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    chosen = options(
        device="cuda", attention_backend="fa_vattn_megacache", max_num_seqs=64, memory_bytes="256mb",
        kv_budget_group="pair",
    )  # fmt: skip
    with (
        running_server(folder, *chosen, env=env) as one, running_server(folder, *chosen, env=env) as other,
        ThreadPoolExecutor(2 * NUM_REQUESTS) as pool,
    ):  # fmt: skip
        total = total_rows(one) + total_rows(other)
        first = [pool.submit(answer, one, number) for number in range(NUM_REQUESTS)]
        second = [pool.submit(answer, other, number) for number in range(NUM_REQUESTS)]
        assert [each.result() for each in [*first, *second]] == [MAX_TOKENS] * (2 * NUM_REQUESTS)
        assert total_rows(one) + total_rows(other) <= total
        other.process.send_signal(signal.SIGKILL)
        wait_until(lambda: total_rows(one) == total, "the killed server's share does not come back")
        assert answer(one, 3) == MAX_TOKENS
