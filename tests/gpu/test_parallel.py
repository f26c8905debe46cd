"""Several GPUs: outputs against transformers in float32, graphs against eager steps, failures."""

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")
from likely import check_likely, prompts, save_llama

from sarathi import LLM, SamplingParams
from sarathi.executor.ranks.group import RankError

pytestmark = pytest.mark.gpu
BACKENDS = ("fa_vattn", "fa_vattn_megacache", "fi_paged_16", "sdpa_vattn")
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gpus_choose_what_transformers_finds_likely(folder: str, backend: str, enforce_eager: bool) -> None:
    with LLM(
        folder, attention_backend=backend, tensor_parallel_size=2, memory_bytes="1gb", chunk_size=256,
        enforce_eager=enforce_eager,
    ) as llm:  # fmt: skip
        outputs = [list(each.outputs[0].token_ids) for each in llm.generate(prompts(), PARAMS, use_tqdm=False)]
    check_likely(folder, outputs, backend)


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pipeline_of_two_gpus_chooses_what_transformers_finds_likely(
    folder: str, backend: str, enforce_eager: bool
) -> None:
    with LLM(
        folder, attention_backend=backend, pipeline_parallel_size=2, memory_bytes="1gb", chunk_size=256,
        enforce_eager=enforce_eager, check_ranks_every=5,
    ) as llm:  # fmt: skip
        outputs = [list(each.outputs[0].token_ids) for each in llm.generate(prompts(), PARAMS, use_tqdm=False)]
    check_likely(folder, outputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_one_gpu_prefills_another_decodes(folder: str, backend: str) -> None:
    """Two engines behind one LLM, keys and values over NCCL; the second time what is cached is not sent."""
    settings = {"attention_backend": backend, "memory_bytes": "1gb", "chunk_size": 256, "prefix_caching": True}
    with LLM(folder, prefill_decode=True, mapped_weights=True, **settings) as llm:
        for level, params in enumerate((PARAMS, replace(PARAMS, n=3)), 1):
            done = llm.generate(prompts(), params, use_tqdm=False)
            for index in range(params.n):
                check_likely(folder, [list(each.outputs[index].token_ids) for each in done], backend)
            llm.sleep(level)
            llm.wake_up()
        for end in (60, 200):  # the second time on top of the first
            asked = [[*prompt, *range(end)] for prompt in prompts()]
            done = llm.generate(asked, PARAMS, use_tqdm=False)
            check_likely(folder, [list(each.outputs[0].token_ids) for each in done], backend, asked)
        assert all(each.num_cached_tokens for each in done)


@pytest.mark.parametrize("grid", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_the_weights_of_two_gpus_go_and_come(folder: str, grid: str) -> None:
    settings = {"attention_backend": BACKENDS[0], "memory_bytes": "1gb", "chunk_size": 256, grid: 2}
    with LLM(folder, mapped_weights=True, **settings) as llm:
        for _ in range(2):
            llm.sleep(level=2)
            llm.wake_up()
            outputs = [list(each.outputs[0].token_ids) for each in llm.generate(prompts(), PARAMS, use_tqdm=False)]
            check_likely(folder, outputs, grid)


def test_a_dummy_llama_runs() -> None:
    with LLM("llama-3-8b", load_format="dummy", tensor_parallel_size=2, max_model_len=4096, max_num_seqs=64) as llm:
        outputs = llm.generate([[5] * 2000, *[[7] * 10] * 40], PARAMS, use_tqdm=False)
        assert all(len(each.outputs[0].token_ids) == 24 for each in outputs)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_frees_the_gpus(folder: str, rank: int, how: signal.Signals) -> None:
    free = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
    llm = LLM(folder, tensor_parallel_size=2, memory_bytes="1gb")
    pid = llm.engine.core.executor._ranks._transport.processes[rank].process.pid
    threading.Timer(0.5, os.kill, (pid, how)).start()
    with pytest.raises(RankError, match=f"rank {rank} of 2"):
        while True:
            llm.generate(prompts(), PARAMS, use_tqdm=False)
    llm.close()
    assert all(torch.cuda.mem_get_info(index)[0] > free[index] - (64 << 20) for index in range(2))
