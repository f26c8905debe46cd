"""The whole engine on a GPU, every backend, against transformers in float32 on the same weights.

A token is right where the reference gives it the largest logit, or one so near that transformers' own bf16 moves two
logits of that sequence further apart.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")
import triton
from transformers import AutoModelForCausalLM, LlamaConfig

from sarathi import LLM, SamplingParams
from sarathi.messages import NewRequest, SampledToken
from sarathi.model_executor.attention.base import KernelUnavailableError
from sarathi.model_executor.attention.flash_attn.backend import FlashAttentionBackend
from sarathi.model_executor.ops.native import NativeOps
from sarathi.model_executor.sampling.plan import plan_sampling
from sarathi.model_executor.sampling.sampler import filtered
from sarathi.worker.cuda_graphs import DecodeGraph
from sarathi.worker.piecewise_graphs import PiecewiseGraph
from sarathi.worker.sequences import SequenceTable

pytestmark = pytest.mark.gpu
BACKENDS = (
    "fa_vattn", "fa_vattn_sync", "fa_vattn_megacache", "fa_vattn_megacache_sync", "fa3_vattn", "fa_paged_16",
    "fa_paged_256", "fa4_vattn", "fa4_paged_128", "fi_vattn", "fi_vattn_sync", "fi_vattn_megacache", "fi_paged_16",
    "sdpa_vattn", "sdpa_paged_16",
)  # fmt: skip
MIB = 1 << 20
LOGPROB_ERROR = 0.3  # of the spread of the logits
SHAPES = {
    "gqa4-head64": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "gqa2-head128": {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
}


@dataclass
class Model:
    """A saved model on the GPU, as transformers computes it in float32 and in bf16."""

    folder: Path
    reference: torch.nn.Module
    rounded: torch.nn.Module

    @torch.no_grad()
    def logits(self, prompt: list[int], output: list[int], *, rounded: bool = False) -> torch.Tensor:
        """[len(output), vocab_size] float32 on the CPU: what each output token is taken from."""
        ids = torch.tensor([[*prompt, *output]], device="cuda")
        found = (self.rounded if rounded else self.reference)(ids).logits
        return found[0, len(prompt) - 1 : -1].float().cpu()

    def shortfall(self, prompt: list[int], output: list[int], params: SamplingParams | None = None) -> float:
        """How far the worst output token's logit lies below the largest, over what bf16 does to two logits.

        params: the penalties and bans that hold; None for none.
        """
        logits = self.logits(prompt, output)
        confused = 2 * (logits - self.logits(prompt, output, rounded=True)).abs().max()
        for position, row in enumerate(logits if params else ()):
            penalise(row, prompt, output[:position], params)
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        return float((logits.amax(-1) - chosen).max() / confused)


def penalise(row: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams) -> None:
    """One row of logits by the definitions, token by token."""
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    if len(output) < params.min_tokens:
        row[list(params.stop_token_ids)] = float("-inf")
    for *beginning, last in params.bad_words:
        if output[len(output) - len(beginning) :] == beginning:
            row[last] = float("-inf")
    if params.allowed_token_ids is not None:
        row[sorted({*range(len(row))} - {*params.allowed_token_ids})] = float("-inf")
    for token in {*prompt, *output}:
        row[token] *= params.repetition_penalty if row[token] < 0 else 1 / params.repetition_penalty
    for token, count in Counter(output).items():
        row[token] -= params.frequency_penalty * count + params.presence_penalty


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


def make_model(folder: Path, **shape: int) -> Model:
    torch.manual_seed(shape["num_attention_heads"])
    common = {"vocab_size": 1000, "intermediate_size": 768, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    random_model = AutoModelForCausalLM.from_config(LlamaConfig(**common, **shape))
    for name, parameter in random_model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.06)
    random_model.to(torch.bfloat16).save_pretrained(folder)
    dtypes = (torch.float32, torch.bfloat16)
    return Model(folder, *(AutoModelForCausalLM.from_pretrained(folder, dtype=each).eval().cuda() for each in dtypes))


def open_llm(model: Model, backend: str, **settings: object) -> LLM:
    """Without prefix caching: a prompt that comes again is computed as the first time, with the same rounding."""
    defaults = {"memory_bytes": 160 * MIB, "max_num_seqs": 16, "chunk_size": 192, "dtype": "bfloat16", "device": "cuda"}
    defaults["prefix_caching"] = False
    try:
        return LLM(str(model.folder), attention_backend=backend, **{**defaults, **settings})
    except KernelUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=BACKENDS)
def llm(request: pytest.FixtureRequest, model: Model) -> Iterator[LLM]:
    with open_llm(model, request.param) as llm:
        yield llm
        llm.engine.core.executor.check_integrity()


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
    print(f"largest shortfall {max(shortfalls):.4f} of what bf16 does")
    assert all(len(output.outputs[0].token_ids) == 24 for output in outputs)
    assert max(shortfalls) < 1


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
    assert model.shortfall(prompt, plain.outputs[0].token_ids) < 1


CERTAIN = {  # what leaves a single token, however it is drawn
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.4},
    "counts": {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    "bias": {"temperature": 0.0, "logit_bias": {17: 6.0, 400: -5.0}},
    "top_k": {"temperature": 0.9, "top_k": 1, "seed": 3},
    "top_p": {"temperature": 1.3, "top_p": 1e-6, "repetition_penalty": 1.2},
    "min_p": {"temperature": 0.7, "min_p": 1.0, "frequency_penalty": 0.4},
}


def test_penalties_and_filters_are_the_references_but_for_rounding(model: Model, llm: LLM) -> None:
    """Penalties count the newest token, which the host does not know yet when a step that needs it is sent."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    random.seed(seed)
    every = [*CERTAIN.values(), {"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2}]
    params = [SamplingParams(max_tokens=20, ignore_eos=True, **each) for each in every * 3]
    prompts = random_prompts(len(params), 80)
    outputs = [each.outputs[0].token_ids for each in llm.generate(prompts, params, use_tqdm=False)]
    shortfalls = [model.shortfall(*each) for each in zip(prompts, outputs, params, strict=True)]
    print([f"{each:.3f}" for each in shortfalls])
    assert all(len(output) == 20 for output in outputs)
    assert max(shortfalls) < 2  # a penalty multiplies what is rounded


def test_min_tokens_counts_from_the_position(model: Model, llm: LLM) -> None:
    prompt = random_prompts(1, 50)[0]
    likely = llm.generate(prompt, greedy(12), use_tqdm=False)[0].outputs[0].token_ids
    params = greedy(12, min_tokens=7, stop_token_ids=tuple(set(likely)))
    found = llm.generate([prompt] * 3, params, use_tqdm=False)[1].outputs[0]
    assert len(found.token_ids) >= 7 and not set(found.token_ids[:7]) & set(likely)
    assert model.shortfall(prompt, list(found.token_ids), params) < 1


def test_draws_invert_the_references_distribution(model: Model, llm: LLM) -> None:
    """The token drawn lies where the number of its seed and position falls in the filtered distribution."""
    kinds = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"top_p": 0.8, "top_k": 200, "min_p": 0.01}]
    params = [
        SamplingParams(temperature=random.uniform(0.5, 1.5), seed=seed, max_tokens=20, ignore_eos=True, **kind)
        for seed, kind in enumerate(kinds * 3)
    ]
    prompts = random_prompts(len(params), 80)
    outputs = llm.generate([*prompts, prompts[0]], [*params, greedy(20)], use_tqdm=False)
    for prompt, each, output in zip(prompts, params, outputs[:-1], strict=True):
        drawn = list(output.outputs[0].token_ids)
        outside = distances_from_the_draws(model.logits(prompt, drawn), prompt, drawn, each)
        # Rounding may move a token across the border of a nucleus, and with it much of what is left.
        assert outside.quantile(0.8) < 0.05, (each, outside)


def distances_from_the_draws(
    logits: torch.Tensor, prompt: list[int], drawn: list[int], params: SamplingParams
) -> torch.Tensor:
    """How far each number lies from its token's share of [0, 1)."""
    table = SequenceTable(0)
    table.add([NewRequest("a", tuple(prompt), params)])
    table.append(SampledToken("a", token) for token in drawn)
    rows = [table["a"].next_token(len(prompt) + index) for index in range(len(drawn))]
    draws = plan_sampling(rows, logits.shape[1]).draws
    reached = filtered(logits, draws, NativeOps()).double().softmax(-1).cumsum(-1)
    chosen = torch.tensor(drawn)[:, None]
    last = reached.gather(1, chosen)
    first = torch.where(chosen > 0, reached.gather(1, (chosen - 1).clamp(min=0)), 0.0)
    return torch.maximum(first - draws.uniform, draws.uniform - last).clamp(min=0.0)


def test_logprobs_are_the_references_but_for_rounding(model: Model, llm: LLM) -> None:
    params = [greedy(12, logprobs=3), SamplingParams(logprobs=0, max_tokens=12, ignore_eos=True), greedy(12)]
    prompts = random_prompts(3, 50)
    first, second, none = [each.outputs[0] for each in llm.generate(prompts, params, use_tqdm=False)]
    assert not none.logprobs
    for prompt, output, count in ((prompts[0], first, 3), (prompts[1], second, 0)):
        tokens = list(output.token_ids)
        logits = model.logits(prompt, tokens)
        for row, token, found in zip(logits, tokens, output.logprobs, strict=True):
            assert token in found and count <= len(found) <= count + 1
            expected = row.log_softmax(-1)
            errors = [abs(each.logprob - float(expected[other])) for other, each in found.items()]
            assert max(errors) < LOGPROB_ERROR * float(row.std()), (token, found)


def test_logprobs_of_prompts_in_chunks_are_the_references_but_for_rounding(model: Model, llm: LLM) -> None:
    prompts = [*random_prompts(4, 60), [random.randrange(1000) for _ in range(500)], [7]]
    params = [greedy(6, prompt_logprobs=count) for count in (0, 3, 1, 0, 2, 2)]
    outputs = llm.generate([*prompts, prompts[0]], [*params, greedy(6)], use_tqdm=False)
    assert outputs[-1].prompt_logprobs is None
    for prompt, each, output in zip(prompts, params, outputs, strict=False):
        first, *found = output.prompt_logprobs
        assert first is None and len(found) == len(prompt) - 1
        for row, token, entry in zip(model.logits(prompt[:1], prompt[1:]), prompt[1:], found, strict=True):
            assert next(iter(entry)) == token and each.prompt_logprobs <= len(entry) <= each.prompt_logprobs + 1
            expected = row.log_softmax(-1)
            errors = [abs(each.logprob - float(expected[other])) for other, each in entry.items()]
            assert max(errors) < LOGPROB_ERROR * float(row.std()), (token, entry)
        assert model.shortfall(prompt, output.outputs[0].token_ids) < 1


def test_constraints_hold_although_steps_are_launched_ahead(model: Model, llm: LLM) -> None:
    def bar_repeats(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[output] = float("-inf")
        return logits

    pairs = [(first, last) for first in range(1000) for last in (3, 500)]  # of which no output has one
    kinds = [{"allowed_token_ids": range(100, 400)}, {"bad_words": [[token] for token in range(500)]}]
    params = [greedy(20, **kind) for kind in kinds]
    params += [
        greedy(20, allowed_token_ids=[3, 500, 501], bad_words=pairs),
        greedy(20, logits_processors=[bar_repeats]),
    ]
    prompts = random_prompts(len(params) + 1, 60)
    outputs = llm.generate(prompts, [*params, greedy(20)], use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert set(found[0]) <= set(range(100, 400)) and min(found[1]) >= 500
    assert set(found[2][1:]) == {501} and len(set(found[3])) == 20
    for prompt, each, output in zip(prompts[:3], params, found, strict=False):
        assert model.shortfall(prompt, output, each) < 1
    assert model.shortfall(prompts[-1], found[-1]) < 1


def test_sampled_decodes_run_by_graph_and_wait_for_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [*CERTAIN.values(), {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "logprobs": 3}, {"min_tokens": 5}]
    params = [SamplingParams(max_tokens=16, ignore_eos=True, stop_token_ids=(999,), **each) for each in kinds]
    prompts, replays = random_prompts(len(params), 40), []
    with open_llm(model, "fa_vattn") as llm:
        llm.generate(prompts, params, use_tqdm=False)  # compiles what is compiled on first use
        runner = llm.engine.core.executor._worker._runner
        launch, replay = runner.launch, DecodeGraph.replay

        def launch_without_waiting(out, sequences):
            decodes = all(chunk.num_tokens == 1 for chunk in out.chunks)
            torch.cuda.set_sync_debug_mode("error" if decodes else "default")
            try:
                return launch(out, sequences)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(runner, "launch", launch_without_waiting)
        monkeypatch.setattr(DecodeGraph, "replay", lambda *given: replays.append(given) or replay(*given))
        llm.generate(prompts, params, use_tqdm=False)
    assert len(replays) >= 10


@pytest.mark.parametrize("backend", ["fa_vattn", "fa_vattn_megacache", "fa_paged_16", "fi_vattn", "fi_paged_16"])
def test_steps_of_few_tokens_replay_graphs(model: Model, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks beside decodes, and decodes where the backend captures none: all but steps of decodes alone."""
    prompts, by_pieces, steps = [*random_prompts(8, 60), *random_prompts(3, 900)], [], []
    with open_llm(model, backend) as llm:
        runner = llm.engine.core.executor._worker._runner
        launch, run = runner.launch, PiecewiseGraph.run
        monkeypatch.setattr(runner, "launch", lambda out, sequences: steps.append(out.chunks) or launch(out, sequences))
        monkeypatch.setattr(PiecewiseGraph, "run", lambda *given: by_pieces.append(given) or run(*given))
        outputs = llm.generate(prompts, greedy(20), use_tqdm=False)
        captures_decodes = runner._can_capture
    expected = [chunks for chunks in steps if not captures_decodes or any(each.num_tokens > 1 for each in chunks)]
    assert len(by_pieces) == len(expected) > 4
    for prompt, output in zip(prompts, outputs, strict=True):
        assert model.shortfall(prompt, output.outputs[0].token_ids) < 1


def test_an_interrupt_in_the_middle_leaves_the_device_usable(model: Model) -> None:
    """Steps are in flight when the cache is closed."""
    for _ in range(3):
        with open_llm(model, "fa_vattn_megacache", max_num_seqs=64) as llm:
            for number, prompt in enumerate(random_prompts(64, 900)):
                llm.engine.add_request(str(number), prompt, greedy(100))
            for _ in range(random.randint(3, 30)):
                llm.engine.step()
        torch.cuda.synchronize()


def test_nothing_is_compiled_while_requests_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is compiled before the first request, whatever the number of sequences and tokens of a step."""
    model = make_model(tmp_path, hidden_size=640, num_attention_heads=40, num_key_value_heads=20, head_dim=64)
    prompts = [*random_prompts(120, 60), *random_prompts(4, 700), *random_prompts(40, 60)]
    params = [greedy(random.randint(20, 60)) for _ in prompts]
    compiled: list[str] = []
    in_two: list[int] = []
    attend = FlashAttentionBackend._attend_split
    monkeypatch.setattr(
        FlashAttentionBackend, "_attend_split", lambda *given: in_two.append(len(given[2])) or attend(*given)
    )
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["repr"]))
    with open_llm(model, "fa_vattn", max_num_seqs=130, memory_bytes=1200 * MIB) as llm:
        assert compiled, "a model of another shape needs kernels of its own"
        compiled.clear()
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [each.max_tokens for each in params]
    assert not compiled
    assert in_two, "decodes before chunks were never so many that they had a call of their own"


@pytest.mark.parametrize("backend", ["fa_vattn", "fa_vattn_megacache", "fa_paged", "fi_vattn", "sdpa_vattn"])
def test_a_request_whose_logits_are_not_finite_ends_alone(tmp_path: Path, backend: str) -> None:
    """One token has an embedding of NaN. Its requests end, others in the batch and later ones are as without it."""
    model = make_model(tmp_path, **SHAPES[next(iter(SHAPES))])
    with torch.no_grad():
        model.rounded.model.embed_tokens.weight[999] = float("nan")
        for each in (model.reference, model.rounded):
            each.lm_head.weight[999] = 0.0  # never the largest
    model.rounded.save_pretrained(tmp_path)
    prompts = [[token % 999 for token in prompt] for prompt in random_prompts(12, 300)]
    params = [greedy(20), SamplingParams(max_tokens=20, seed=1, logit_bias={999: -100.0}, ignore_eos=True)] * 6
    with open_llm(model, backend) as llm:
        broken = [[5, 999, 7], *prompts, [999] * 250]
        found = llm.generate(broken, [greedy(20), *params, params[1]], use_tqdm=False)
        again = llm.generate(prompts, params, use_tqdm=False)
    for output in (found.pop(0), found.pop()):
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("error", [])
        assert "not finite" in output.outputs[0].stop_reason
    for outputs in (found, again):
        assert all(len(output.outputs[0].token_ids) == 20 for output in outputs)
        for prompt, output in list(zip(prompts, outputs, strict=True))[::2]:
            assert model.shortfall(prompt, output.outputs[0].token_ids) < 1


def test_kernels_start_while_nothing_is_mapped_for_any_request(model: Model, llm: LLM) -> None:
    """A launcher looks up the address of the whole cache, whichever slots have memory."""
    if llm.engine.core.executor._worker._cache.block_size is not None:
        pytest.skip("blocks are always there")
    prompt = random_prompts(1, 50)[0]
    llm.generate(prompt, greedy(4), use_tqdm=False)
    llm.engine.core.executor._worker._cache._cache.reclaim_idle()
    [output] = llm.generate(prompt, greedy(4), use_tqdm=False)
    assert model.shortfall(prompt, output.outputs[0].token_ids) < 1
