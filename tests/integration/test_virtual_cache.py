"""VirtualCache under transformers' own SmolLM2: greedy, beams, prompt lookup and an assistant, beside DynamicCache."""

from collections.abc import Iterator

import pytest
import torch
from smollm2 import load_reference
from transformers import DynamicCache, PreTrainedModel

from sarathi.engine.tokenizer.load import load_tokenizer
from sarathi.model_executor.loader.source import resolve_model
from vattention.transformers import VirtualCache

PROMPT = "The lighthouse had stood on the rocks for two hundred years, and in all that time its lamp had failed"
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": None},  # the model itself: every draft is accepted
}


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    yield load_reference()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_smollm2_writes_the_same_tokens(way: str, model: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    options = {name: model if value is None else value for name, value in WAYS[way].items()}
    say = {
        "max_new_tokens": 24,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
        **options,
    }
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **say)
    with VirtualCache(model.config, max_tokens=512, budget_bytes=1 << 30) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **say), expected)
        assert expected.shape[1] == ids.shape[1] + 24 and cache.stats().mapped_bytes > 0
