"""The whole engine on a GPU, every backend, against transformers in float32 on the same weights.

A token is right where the reference gives it the largest logit, or one so near that bf16 cannot tell them apart.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")

from transformers import AutoModelForCausalLM, LlamaConfig

from sarathi import LLM, SamplingParams
from sarathi.model_executor.attention.backend import KernelUnavailableError

pytestmark = pytest.mark.gpu
BACKENDS = (
    "fa_vattn", "fa_vattn_sync", "fa_vattn_megacache", "fa_vattn_megacache_sync", "fa3_vattn", "fa_paged_16",
    "fa_paged_256", "fi_vattn", "fi_vattn_sync", "fi_vattn_megacache", "fi_paged_16", "sdpa_vattn", "sdpa_paged_16",
)  # fmt: skip
MIB = 1 << 20
ROUNDING = 0.1  # of the spread of the logits: what bf16 may confuse
SHAPES = {
    "gqa4-head64": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "gqa2-head128": {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
}


@dataclass
class Model:
    """A saved model and its float32 reference on the GPU."""

    folder: Path
    reference: torch.nn.Module

    @torch.inference_mode()
    def shortfall(self, prompt: list[int], output: list[int]) -> float:
        """How far the worst output token's logit lies below the largest, in units of the logits' spread."""
        ids = torch.tensor([[*prompt, *output]], device="cuda")
        logits = self.reference(ids).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(len(request.param))
    config = LlamaConfig(
        vocab_size=1000,
        intermediate_size=768,
        num_hidden_layers=2,
        max_position_embeddings=4096,
        **SHAPES[request.param],
    )  # fmt: skip
    random_model = AutoModelForCausalLM.from_config(config)
    for name, parameter in random_model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.06)
    folder = tmp_path_factory.mktemp(request.param)
    random_model.to(torch.bfloat16).save_pretrained(folder)
    return Model(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda())


def open_llm(model: Model, backend: str, **settings: object) -> LLM:
    defaults = {"memory_bytes": 160 * MIB, "max_num_seqs": 16, "chunk_size": 192, "dtype": "bfloat16", "device": "cuda"}
    try:
        return LLM(str(model.folder), attention_backend=backend, **{**defaults, **settings})
    except KernelUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=BACKENDS)
def llm(request: pytest.FixtureRequest, model: Model) -> Iterator[LLM]:
    with open_llm(model, request.param) as llm:
        yield llm
        llm.engine.executor.check_integrity()


def random_prompts(count: int, longest: int) -> list[list[int]]:
    return [[random.randrange(1000) for _ in range(random.randint(1, longest))] for _ in range(count)]


def greedy(max_tokens: int, **params: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params)


def test_outputs_are_the_references_but_for_rounding(model: Model, llm: LLM) -> None:
    """Mixed batches, chunks, growth past a page, more requests than memory holds at once."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    random.seed(seed)
    prompts = [*random_prompts(20, 60), *random_prompts(4, 2500), [random.randrange(1000) for _ in range(1020)]]
    outputs = llm.generate(prompts, greedy(24), use_tqdm=False)
    shortfalls = [
        model.shortfall(prompt, output.outputs[0].token_ids) for prompt, output in zip(prompts, outputs, strict=True)
    ]
    print(f"largest shortfall {max(shortfalls):.4f} of a standard deviation")
    assert all(len(output.outputs[0].token_ids) == 24 for output in outputs)
    assert max(shortfalls) < ROUNDING


def test_a_stop_leaks_no_token_and_an_abort_frees_its_memory(llm: LLM) -> None:
    """Both take effect while the next step is in flight already."""
    prompt = random_prompts(1, 100)[0]
    tokens = llm.generate(prompt, greedy(12), use_tqdm=False)[0].outputs[0].token_ids
    stop = tokens[5]
    [stopped] = llm.generate(prompt, greedy(12, stop_token_ids=(stop,)), use_tqdm=False)
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].token_ids == tokens[: tokens.index(stop) + 1]
    engine = llm.engine
    engine.add_request("gone", prompt, greedy(500))
    for _ in range(20):
        engine.step()
    engine.abort("gone")
    while engine.has_work:
        engine.step()
    stats = llm.memory_stats()
    assert stats.mapped_bytes == stats.idle_bytes


def test_sampled_requests_beside_greedy_ones(model: Model, llm: LLM) -> None:
    """A seed repeats its tokens; greedy neighbours are not disturbed."""
    prompt = random_prompts(1, 50)[0]
    drawn = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=16, ignore_eos=True)
    first, plain, second = llm.generate([prompt] * 3, [drawn, greedy(16), drawn], use_tqdm=False)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert model.shortfall(prompt, plain.outputs[0].token_ids) < ROUNDING


def test_kernels_start_while_nothing_is_mapped_for_any_request(model: Model, llm: LLM) -> None:
    """A launcher looks up the address of the whole cache, whichever slots have memory."""
    if llm.engine.executor.backend.is_paged:
        pytest.skip("blocks are always there")
    prompt = random_prompts(1, 50)[0]
    llm.generate(prompt, greedy(4), use_tqdm=False)
    llm.engine.executor._worker._cache._cache.reclaim_idle()
    [output] = llm.generate(prompt, greedy(4), use_tqdm=False)
    assert model.shortfall(prompt, output.outputs[0].token_ids) < ROUNDING
