"""Tiny models of every family written as GGUF files: greedy tokens are those of transformers on the same weights."""

import random
from pathlib import Path

import pytest
import torch
from gguf_files import MODELS, write_gguf
from tiny_models import VOCAB_SIZE, TinyModel, build

from sarathi import LLM, SamplingParams
from sarathi.engine.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)


def generate(file: Path, prompt: list[int]) -> RequestOutput:
    with LLM(str(file), device="cpu", memory_bytes=2**23, max_num_seqs=2) as llm:
        return llm.generate([prompt], GREEDY, use_tqdm=False)[0]


def largest_difference(tiny: TinyModel, output: RequestOutput) -> float:
    """Of the log probabilities of the tokens drawn, and of the likeliest ones in transformers."""
    [completion] = output.outputs
    prompt, tokens = list(output.prompt_token_ids), list(completion.token_ids)
    expected = tiny.logprobs(prompt + tokens[:-1])[len(prompt) - 1 :].max(-1).values
    found = [each[token].logprob for token, each in zip(tokens, completion.logprobs, strict=True)]
    return tiny.beyond_rounding(float((torch.tensor(found) - expected).abs().max()), prompt + tokens)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    tiny = build(name, tmp_path)
    write_gguf(tiny, name, tmp_path / "m.gguf")
    output = generate(tmp_path / "m.gguf", random.choices(range(VOCAB_SIZE), k=80))
    assert largest_difference(tiny, output) < 1e-4


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_each_bias_of_a_llama_file_reaches_the_logits(projection: str, tmp_path: Path) -> None:
    """transformers without one of the biases computes something else, by more than any rounding."""
    tiny = build("llama2", tmp_path, attention_bias=True)
    write_gguf(tiny, "llama2", tmp_path / "m.gguf")
    output = generate(tmp_path / "m.gguf", random.choices(range(VOCAB_SIZE), k=20))
    assert largest_difference(tiny, output) < 1e-4
    for layer in tiny.reference.model.layers:
        getattr(layer.self_attn, projection).bias.data.zero_()
    assert largest_difference(tiny, output) > 1e-3
