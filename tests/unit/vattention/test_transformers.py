"""VirtualCache under `generate`: the tokens and logits of DynamicCache, on tiny random models."""

import copy
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from vattention import OutOfMemoryError
from vattention.transformers import VirtualCache

ROOT = Path(__file__).parents[3]
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": None,
    "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "Llama": {},
    "Qwen2": {"head_dim": None},
    "Qwen2 windows": {"head_dim": None, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "Qwen3": {},
    "Mistral": {"sliding_window": 12},
    "Mistral full": {"sliding_window": None},
    "Gemma": {},
    "Gemma2": {"sliding_window": 12},
    "Gemma3": {"sliding_window": 12},
    "GPT2": {},
}
WORDS = {"Gemma3": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def config_of(name: str):
    family = name.split()[0]
    if family == "GPT2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
        return transformers.GPT2Config(**sizes, eos_token_id=None, pad_token_id=0, bos_token_id=1)
    sizes = {**SIZES, **MODELS[name]}
    if sizes["head_dim"] is None:  # the family has no such field
        del sizes["head_dim"]
    kind = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, kind)(**sizes)


def model_of(name: str, seed: int):
    torch.manual_seed(seed)
    family = name.split()[0]
    model = getattr(transformers, WORDS.get(family, f"{family}ForCausalLM"))(config_of(name)).eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.1)  # so that logits are far from equal
    return model


def virtual(model, **changes) -> VirtualCache:
    return VirtualCache(model.config, **{"max_tokens": 256, "budget_bytes": 64 << 20, "page_bytes": 4096, **changes})


def prompts(batch: int = 2) -> dict[str, torch.Tensor]:
    """Padded on the left, as decoder-only models are: [batch, 21]."""
    ids, mask = torch.randint(2, VOCABULARY, (batch, 21)), torch.ones(batch, 21, dtype=torch.long)
    for i in range(batch):
        ids[i, : 3 * i], mask[i, : 3 * i] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def seeded() -> int:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return seed


def assert_same(model, inputs: dict[str, torch.Tensor], **options) -> None:
    say = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True, **options}
    seed = seeded()
    torch.manual_seed(seed)  # of what is drawn
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **say)
    torch.manual_seed(seed)
    with virtual(model) as cache:
        got = model.generate(**inputs, past_key_values=cache, **say)
        assert cache.get_seq_length() == expected.past_key_values.get_seq_length() > 30
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_greedy_beams_and_samples_equal_dynamic_cache(family: str) -> None:
    model = model_of(family, seeded())
    assert_same(model, prompts(), do_sample=False)
    assert_same(model, prompts(), do_sample=False, num_beams=3)
    assert_same(model, prompts(), do_sample=True, temperature=0.9, top_k=20, num_return_sequences=2)


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2"])
def test_assisted_generation_equals_dynamic_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assistant, a disturbed copy, is right sometimes: drafts are accepted in part, and cropped."""
    seed = seeded()
    model, assistant = model_of(family, seed), model_of(family, seed)
    removed, crop = [], VirtualCache.crop
    monkeypatch.setattr(VirtualCache, "crop", lambda cache, tokens: (removed.append(-tokens), crop(cache, tokens)))
    for weight in assistant.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.05)
    assert_same(model, prompts(1), do_sample=False, assistant_model=assistant)
    assert_same(model, prompts(1), do_sample=False, prompt_lookup_num_tokens=3)
    assert sum(removed) > 0


def test_memory_follows_the_tokens_and_reset_takes_another_batch() -> None:
    model = model_of("Llama", seeded())
    with virtual(model, max_tokens=100_000) as cache:
        with pytest.raises(ValueError, match="before the first token"):
            cache.stats()
        for batch in (3, 1, 4):
            model.generate(**prompts(batch), max_new_tokens=5, past_key_values=cache)
            stats = cache.stats()  # 25 tokens of 64 bytes: a page in each of 6 regions
            assert stats.mapped_bytes - stats.idle_bytes == batch * 6 * 4096
            cache.reset()
            assert cache.get_seq_length() == 0 and cache.stats().mapped_bytes == cache.stats().idle_bytes
    assert "closed" in repr(cache)
    with pytest.raises(ValueError, match="closed"):
        model.generate(**prompts(1), max_new_tokens=5, past_key_values=cache)


def test_a_second_turn_continues_the_first() -> None:
    model, ids = model_of("Mistral", seeded()), torch.randint(2, VOCABULARY, (1, 60))
    with virtual(model) as cache, torch.no_grad():
        first = model(ids[:, :25], past_key_values=cache).logits
        second = model(ids[:, 25:], past_key_values=cache).logits
        cache.crop(-20)
        third = model(ids[:, 40:], past_key_values=cache).logits
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(third, whole[:, 40:], rtol=1e-4, atol=1e-4)


CHANGES = [
    (2, lambda cache: None),
    (6, lambda cache: cache.batch_repeat_interleave(3)),
    (6, lambda cache: cache.reorder_cache(torch.tensor([5, 1, 1, 0, 3, 2]))),
    (4, lambda cache: cache.batch_select_indices(torch.tensor([4, 0, 3, 3]))),
    (3, lambda cache: cache.batch_select_indices(torch.tensor([True, False, True, True]))),
]


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_sequences_are_repeated_dropped_and_reordered_as_in_dynamic_cache(family: str) -> None:
    model = model_of(family, seeded())
    with virtual(model, max_batch_size=6) as ours, torch.no_grad():
        theirs = DynamicCache(config=model.config)
        for batch, change in CHANGES:
            for cache in (ours, theirs):
                change(cache)
            ids = torch.randint(2, VOCABULARY, (batch, 9))
            got, expected = (model(ids, past_key_values=cache).logits for cache in (ours, theirs))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_sequences_that_cannot_be_repeated_stay_as_they_are() -> None:
    model, ids = model_of("Llama", seeded()), torch.randint(2, VOCABULARY, (2, 30))
    with virtual(model, budget_bytes=4 * 6 * 4096, max_batch_size=6) as cache, torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(OutOfMemoryError):
            cache.batch_repeat_interleave(3)
        with pytest.raises(ValueError, match=r"max_batch_size is 6: .* has 8"):
            cache.batch_repeat_interleave(4)
        with pytest.raises(ValueError, match="no sequence would be left"):
            cache.batch_select_indices(torch.tensor([], dtype=torch.long))
        with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
            cache.batch_repeat_interleave(0)
        got, whole = model(ids[:, 20:], past_key_values=cache).logits, model(ids, use_cache=False).logits
        torch.testing.assert_close(got, whole[:, 20:], rtol=1e-4, atol=1e-4)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(cache)


def test_errors_name_what_is_wrong() -> None:
    model = model_of("Llama", seeded())
    inputs = prompts(2)
    with virtual(model, max_batch_size=1) as cache, pytest.raises(ValueError, match=r"max_batch_size is 1: .* has 2"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
    with virtual(model, budget_bytes=6 * 4096) as cache, pytest.raises(OutOfMemoryError):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
    with virtual(model, max_tokens=22) as cache, pytest.raises(ValueError, match="22"):
        model.generate(**inputs, max_new_tokens=5, past_key_values=cache)
    with virtual(model) as cache:
        with pytest.raises(ValueError, match=r"torch\.no_grad"):
            model(inputs["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match="tokens_to_remove is 3"):
            cache.crop(3)
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        with pytest.raises(ValueError, match=r"must be of \(batch, KV heads, head size\) \(2, 2, 8\)"), torch.no_grad():
            model(inputs["input_ids"][:1], past_key_values=cache)


@pytest.mark.parametrize(
    "config, match",
    [
        (transformers.T5Config(), "t5 has an encoder"),
        (transformers.Qwen3NextConfig(), "linear_attention"),
        (transformers.Gemma3nTextConfig(), "share"),
    ],
)
def test_models_it_cannot_serve_are_refused(config: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VirtualCache(config, max_tokens=10, budget_bytes=1 << 20)


def test_the_package_alone_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, vattention; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
