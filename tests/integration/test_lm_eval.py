"""EleutherAI's lm-eval over the engine, against its own model interface over transformers; pip install lm-eval."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from smollm2 import PROMPTS, load_reference
from transformers import PreTrainedTokenizerFast

from sarathi import LLM

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
sys.path.append(str(Path(__file__).parents[2] / "examples"))
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_model import EngineModel

pytestmark = pytest.mark.slow
WORDS = ("the", "of", "Paris", "boils", "at", "100", "degrees", "and", "water", "sea", "is", "red", "4", "she", "he")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2-135m", device="cpu", memory_bytes="256mb", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(llm: LLM) -> HFLM:
    """On our token ids: the tokenizer that transformers makes of a GGUF file does not split numbers into digits."""
    assert llm.tokenizer is not None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llm.tokenizer.backend, eos_token="<|im_end|>")
    return HFLM(pretrained=load_reference(), tokenizer=tokenizer, device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def model(llm: LLM, reference: HFLM) -> EngineModel:
    return EngineModel(llm, reference.prefix_token_id)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_loglikelihoods(model: EngineModel, reference: HFLM) -> None:
    pairs = [(prompt, " " + " ".join(random.choices(WORDS, k=random.randint(1, 5)))) for prompt in PROMPTS[:16]]
    asked = requests("loglikelihood", [*pairs, ("The capital of France is", " Paris"), ("", "Hello there")])
    ours, theirs = (each.loglikelihood(asked, disable_tqdm=True) for each in (model, reference))
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert ours[-2][1]


def test_texts_scored_from_their_first_token_on(model: EngineModel, reference: HFLM) -> None:
    asked = requests("loglikelihood_rolling", [(prompt,) for prompt in random.sample(PROMPTS, 4)])
    ours, theirs = (each.loglikelihood_rolling(asked, disable_tqdm=True) for each in (model, reference))
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generated_texts(model: EngineModel, reference: HFLM) -> None:
    limits = {"until": ["\n\n", "."], "max_gen_toks": 16}
    asked = requests("generate_until", [(prompt, limits) for prompt in PROMPTS[:6]])
    assert model.generate_until(asked, disable_tqdm=True) == reference.generate_until(asked, disable_tqdm=True)
