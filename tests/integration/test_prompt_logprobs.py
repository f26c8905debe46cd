"""Log probabilities of prompts are transformers', however a prompt is cut into steps; and likelihoods made of them."""

import random
from collections.abc import Iterator

import pytest
import torch
from smollm2 import PROMPTS
from transformers import PreTrainedModel

from sarathi import LLM, SamplingParams
from sarathi.engine.outputs import RequestOutput

ONE = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
TOLERANCE = 5e-3  # nats; float32 on both sides, summed in other orders over logits of up to 30


@pytest.fixture(scope="module", params=["sdpa_vattn", "sdpa_paged_16"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Prompts of more than 64 tokens take several steps, and not all requests fit in the cache at once."""
    settings = {"device": "cpu", "memory_bytes": "96mb", "chunk_size": 64, "max_num_seqs": 8}
    with LLM("smollm2-135m", attention_backend=request.param, **settings) as model:
        yield model


@torch.inference_mode()
def expected_logprobs(reference: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids) - 1, vocab_size], of the tokens behind the first."""
    return reference(torch.tensor([token_ids])).logits[0, :-1].double().log_softmax(-1)


def check(output: RequestOutput, expected: torch.Tensor, num_top: int) -> None:
    token_ids = list(output.prompt_token_ids)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(token_ids)
    for token_id, entry, row in zip(token_ids[1:], output.prompt_logprobs[1:], expected, strict=True):
        assert entry is not None and next(iter(entry)) == token_id
        assert len(entry) in (num_top, num_top + 1)
        for likely, found in entry.items():
            assert found.logprob == pytest.approx(float(row[likely]), abs=TOLERANCE)
        best = sorted((found.logprob for found in entry.values()), reverse=True)[:num_top]
        assert best == pytest.approx(row.topk(num_top).values.tolist(), abs=TOLERANCE)


def test_prompt_logprobs_are_those_of_transformers(llm: LLM, reference: PreTrainedModel) -> None:
    assert llm.tokenizer is not None
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    prompts = [llm.tokenizer.encode(prompt)[:150] for prompt in rng.sample(PROMPTS, 4)]
    prompts += [[rng.randrange(40_000) for _ in range(length)] for length in (1, 2, 65, 300)]
    counts = [rng.choice([0, 1, 3]) for _ in prompts]
    params = [SamplingParams(**ONE, prompt_logprobs=count) for count in counts]
    outputs = llm.generate([*prompts, prompts[0]], [*params, SamplingParams(**ONE)], use_tqdm=False)
    assert outputs[-1].prompt_logprobs is None
    for output, prompt, count in zip(outputs, prompts, counts, strict=False):
        check(output, expected_logprobs(reference, prompt), count)


def test_they_change_nothing_else_and_come_once_with_several_completions(llm: LLM) -> None:
    plain = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=5, logprobs=1)
    asked = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=5, logprobs=1, prompt_logprobs=1)
    prompt = "The capital of France is"
    without, with_them = llm.generate([prompt, prompt], [plain, asked], use_tqdm=False)
    for ours, theirs in zip(with_them.outputs, without.outputs, strict=True):
        assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
    assert with_them.prompt_logprobs is not None
    assert [entry is None for entry in with_them.prompt_logprobs] == [True] + [False] * 4
    entry = with_them.prompt_logprobs[-1]
    assert entry is not None and next(iter(entry.values())).decoded_token == " is"


PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London."),
    ("Water boils at", " 100 degrees Celsius"),
    ("A B C D", " E F G"),
]


def test_likelihoods_as_evaluations_take_them_are_those_of_transformers(llm: LLM, reference: PreTrainedModel) -> None:
    """The sum over a continuation's tokens, and whether greedy decoding writes it; as in examples/lm_eval_model.py."""
    assert llm.tokenizer is not None
    contexts = [llm.tokenizer.encode(context) for context, _ in PAIRS]
    wholes = [llm.tokenizer.encode(context + continuation) for context, continuation in PAIRS]
    outputs = llm.generate(wholes, SamplingParams(**ONE, prompt_logprobs=1), use_tqdm=False)
    is_greedy = []
    for context, whole, output in zip(contexts, wholes, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = [entry or {} for entry in output.prompt_logprobs[len(context) :]]
        chosen = [entry[token].logprob for entry, token in zip(entries, whole[len(context) :], strict=True)]
        best = [max(each.logprob for each in entry.values()) for entry in entries]
        expected = expected_logprobs(reference, whole)[len(context) - 1 :]
        targets = torch.tensor(whole[len(context) :])
        assert sum(chosen) == pytest.approx(float(expected.gather(1, targets[:, None]).sum()), abs=TOLERANCE)
        assert (chosen == best) == bool((expected.argmax(-1) == targets).all())
        is_greedy.append(chosen == best)
    assert is_greedy == [True, False, False, True]


def test_a_preempted_prompt_has_each_of_them_once(reference: PreTrainedModel) -> None:
    """26 blocks of 16 tokens: each request needs 8 for its prompt and 10 in the end, so that one starts again."""
    rng = random.Random(5)
    prompts = [[rng.randrange(40_000) for _ in range(120)] for _ in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    settings = {"device": "cpu", "memory_bytes": 26 * 16 * 46_080, "chunk_size": 48, "watermark": 0.0}
    with LLM("smollm2-135m", attention_backend="sdpa_paged_16", **settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.engine.core.scheduler.num_preemptions > 0
    for output, prompt in zip(outputs, prompts, strict=True):
        check(output, expected_logprobs(reference, prompt), 0)
        assert output.outputs[0].num_tokens == 40
