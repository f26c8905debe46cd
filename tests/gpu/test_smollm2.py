"""SmolLM2 in bf16 on real prompts, every backend: outputs are transformers' unless bf16 cannot tell two tokens apart.

At the first token in which two outputs differ the float32 logits of both are compared. They may lie as far apart as
transformers' own bf16 logits there lie from its float32 logits, for each of the two.
"""

from collections.abc import Sequence
from functools import cache

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")

from smollm2 import PROMPTS, greedy, load_reference
from transformers import PreTrainedModel

from sarathi import LLM, SamplingParams
from sarathi.engine.tokenizer.tokenizer import load_tokenizer
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


@cache
def outputs_of(backend: str) -> list[list[int]]:
    """All prompts at once, in chunks."""
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    try:
        llm = LLM("smollm2-135m", attention_backend=backend, device="cuda", dtype="bfloat16", memory_bytes=2**30,
                  max_num_seqs=32, chunk_size=256)  # fmt: skip
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    with llm:
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
