"""SmolLM2 in bf16 on real prompts, every backend: outputs are transformers' unless bf16 cannot tell two tokens apart.

At the first token in which two outputs differ the float32 logits of both are compared. They may lie as far apart as
transformers' own bf16 logits there lie from its float32 logits, for each of the two.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")

from smollm2 import PROMPTS, greedy, load_reference
from transformers import PreTrainedModel

from sarathi import LLM, SamplingParams
from sarathi.engine.tokenizer.load import load_tokenizer
from sarathi.model_executor.attention.base import KernelUnavailableError
from sarathi.model_executor.loader.source import ModelNotFoundError, resolve_model

pytestmark = pytest.mark.gpu
BACKENDS = (
    "fa_vattn", "fa_vattn_sync", "fa_vattn_megacache", "fa_vattn_megacache_sync", "fa3_vattn", "fa_paged_16",
    "fa_paged_256", "fi_vattn", "fi_vattn_sync", "fi_vattn_megacache", "fi_vattn_megacache_sync", "fi_paged_16",
    "sdpa_vattn", "sdpa_paged_16",
)  # fmt: skip
NUM_TOKENS = 48
Tokens = Sequence[int]


@pytest.fixture(scope="module", autouse=True)
def weights() -> None:
    try:
        resolve_model("smollm2-135m")
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@cache
def reference(dtype: torch.dtype) -> PreTrainedModel:
    return load_reference().to("cuda", dtype)


@cache
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@cache
def expected() -> list[list[int]]:
    return [greedy(reference(torch.bfloat16), prompt, NUM_TOKENS) for prompt in prompts()]


def open_smollm2(backend: str) -> LLM:
    try:
        return LLM("smollm2-135m", attention_backend=backend, device="cuda", dtype="bfloat16", memory_bytes=2**30,
                   max_num_seqs=32, chunk_size=256)  # fmt: skip
    except KernelUnavailableError as error:
        pytest.skip(str(error))


@cache
def outputs_of(backend: str) -> list[list[int]]:
    """All prompts at once, in chunks."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with open_smollm2(backend) as llm:
        answers = llm.generate(prompts(), params, use_tqdm=False)
    return [answer.outputs[0].token_ids for answer in answers]


@torch.inference_mode()
def margin(prompt: Tokens, ours: Tokens, theirs: Tokens) -> float:
    """Float32 logits of the first two tokens that differ, apart, over what bf16 does to two logits there."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if same is None:
        return 0.0
    ids = torch.tensor([[*prompt, *ours[:same]]], device="cuda")
    exact, rounded = (reference(dtype)(ids).logits[0, -1].float() for dtype in (torch.float32, torch.bfloat16))
    return float((exact[ours[same]] - exact[theirs[same]]).abs() / (2 * (exact - rounded).abs().max()))


def largest_margin(ours: Sequence[Tokens], theirs: Sequence[Tokens]) -> float:
    margins = [margin(*each) for each in zip(prompts(), ours, theirs, strict=True)]
    print(f"{sum(m == 0 for m in margins)} of {len(margins)} outputs the same, largest margin {max(margins):.4f}")
    return max(margins)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_those_of_transformers(backend: str) -> None:
    assert largest_margin(outputs_of(backend), expected()) < 1.0


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree(backend: str) -> None:
    assert largest_margin(outputs_of(backend), outputs_of(BACKENDS[0])) < 1.0


ARRAY = {"type": "array", "items": {"enum": ["red", "grün", "蓝", 17, None]}, "minItems": 3, "maxItems": 6}


@pytest.mark.parametrize("backend", ["fa_vattn", "fi_paged_16", "sdpa_vattn"])
def test_structured_outputs_are_valid_although_steps_are_launched_ahead(backend: str) -> None:
    """Beside requests without a limit, whose greedy outputs are as ever but for rounding."""
    limits = [
        {"json": ARRAY},
        {"regex": r"(19|20)\d\d-[01]\d"},
        {"choice": ["yes", "no"]},
        {"grammar": 'start: "ab"{3}'},
    ]
    limited = [
        SamplingParams(temperature=temperature, seed=index, max_tokens=200, structured_outputs=limit)
        for index, limit in enumerate(limits * 4)
        for temperature in (0.0, 1.0)
    ]
    free = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with open_smollm2(backend) as llm:
        outputs = llm.generate([*prompts(), *[PROMPTS[0]] * len(limited)], [*[free] * len(PROMPTS), *limited], False)
    answers = [output.outputs[0] for output in outputs[len(PROMPTS) :]]
    assert largest_margin([output.outputs[0].token_ids for output in outputs[: len(PROMPTS)]], expected()) < 1.0
    assert {answer.finish_reason for answer in answers} == {"stop"}
    texts = [answer.text for answer in answers]
    for number, (kind, fits) in enumerate(CHECKS):
        own = texts[2 * number :: 8] + texts[2 * number + 1 :: 8]
        assert len(own) == 8 and all(map(fits, own)), (kind, own)


def is_array(text: str) -> bool:
    read = json.loads(text)
    return 3 <= len(read) <= 6 and all(each in ARRAY["items"]["enum"] for each in read)


CHECKS = (
    ("json", is_array),
    ("regex", lambda text: re.fullmatch(r"(19|20)\d\d-[01]\d", text)),
    ("choice", lambda text: text in ("yes", "no")),
    ("grammar", lambda text: text == "ababab"),
)


def test_grammars_cost_less_than_a_tenth_of_the_throughput_at_batch_8() -> None:
    array = {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 200}
    free = [SamplingParams(max_tokens=256, ignore_eos=True, seed=seed) for seed in range(8)]
    bound = [replace(each, ignore_eos=False, structured_outputs={"json": array}) for each in free]
    rates: dict[str, float] = {}
    with open_smollm2("fa_vattn") as llm:
        for _ in range(4):
            for name, params in (("free", free), ("bound", bound)):
                began_s = time.perf_counter()
                outputs = llm.generate([PROMPTS[0]] * 8, params, use_tqdm=False)
                seconds = time.perf_counter() - began_s
                tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                assert tokens == 8 * 256
                rates[name] = max(rates.get(name, 0.0), tokens / seconds)
    print(rates)
    assert rates["bound"] > 0.9 * rates["free"]
