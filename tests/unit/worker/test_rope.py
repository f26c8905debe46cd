"""Scaled rotary embeddings: frequencies and logits of transformers, for prompts below and above the original length."""

import copy
import random

import pytest
import torch
from random_driver import RandomDriver
from tiny_models import CONFIGS, VOCAB_SIZE, TinyModel, build
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sarathi.config.load import make_config
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.messages import SampledToken
from sarathi.model_executor.fields import UnsupportedModelError
from sarathi.model_executor.models import read_architecture
from sarathi.model_executor.rope import RopeFrequencies
from sarathi.sampling_params import SamplingParams

SCALED = ("llama3.1", "llama-linear", "llama-yarn", "qwen2-yarn", "llama-dynamic", "llama-longrope")
NUM_OUTPUTS = 12
EVERYTHING = SamplingParams(temperature=0.0, logprobs=VOCAB_SIZE, max_tokens=NUM_OUTPUTS)


@pytest.fixture(scope="module", params=SCALED)
def tiny(request, tmp_path_factory) -> TinyModel:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def random_scaling(kind: str, rng: random.Random, half: int) -> dict:
    common = {"rope_type": kind, "rope_theta": rng.uniform(100, 1e6), "factor": rng.uniform(1.0, 40.0)}
    original = {"original_max_position_embeddings": rng.randint(16, 5000)}
    low = rng.uniform(0.5, 2)
    own = {
        "yarn": original | rng.choice([{}, {"beta_fast": rng.uniform(8, 64), "truncate": False}, {
            "mscale": rng.uniform(0.5, 2), "mscale_all_dim": rng.uniform(0.5, 2)}, {"attention_factor": 1.25}]),
        "llama3": original | {"low_freq_factor": low, "high_freq_factor": low + rng.uniform(0.5, 4)},
        "longrope": original | {name: [rng.uniform(1, 9) for _ in range(half)]
                                for name in ("short_factor", "long_factor")},
    }  # fmt: skip
    return common | own.get(kind, {})


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic", "longrope"])
def test_frequencies_equal_transformers(kind: str) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(50):
        heads, head_size = rng.randint(1, 8), 2 * rng.randint(2, 64)
        config = LlamaConfig(
            hidden_size=heads * head_size, num_attention_heads=heads, max_position_embeddings=rng.randint(64, 9000),
            rope_parameters=random_scaling(kind, rng, head_size // 2),
        )  # fmt: skip
        rope = read_architecture(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}).rope
        for length in (1, rope.original_max_positions, rope.original_max_positions + 1, 4 * 9000):
            expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=torch.tensor(length))
            cos_sin = RopeFrequencies(rope, head_size).cos_sin(torch.tensor([1, 77]), torch.tensor([length, length]))
            angles = torch.outer(torch.tensor([1.0, 77.0]), expected)
            torch.testing.assert_close(cos_sin.cos, angles.cos() * factor, atol=2e-5, rtol=0)
            torch.testing.assert_close(cos_sin.sin, angles.sin() * factor, atol=2e-5, rtol=0)


@torch.inference_mode()
def logits_of_generate(tiny: TinyModel, prompt: list[int], outputs: list[int]) -> torch.Tensor:
    """transformers, with a cache: the prompt in one call, then token by token; a model that has seen no other text."""
    model = copy.deepcopy(tiny.reference)
    out = model(torch.tensor([prompt]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in outputs[:-1]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


def ours(tokens: list[SampledToken]) -> torch.Tensor:
    found = torch.empty(len(tokens), VOCAB_SIZE)
    for row, token in zip(found, tokens, strict=True):
        ids, values = zip(*token.top_logprobs, strict=True)
        row[list(ids)] = torch.tensor(values)
    return found


@pytest.mark.parametrize("backend", ["sdpa_paged_16", "sdpa_vattn_megacache"])
def test_logits_equal_transformers_below_across_and_above_the_original_length(tiny: TinyModel, backend: str) -> None:
    """Chunks, mixed batches and preemptions are random; the original length of these models is 64 tokens."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    executor = UniprocExecutor(
        make_config(model=str(tiny.folder), attention_backend=backend, device="cpu", memory_bytes=2**23, max_num_seqs=8)
    )
    lengths = [rng.randint(1, 50), 53, 63, 64, 65, rng.randint(66, 100), 200]
    prompts = {str(at): [rng.randrange(VOCAB_SIZE) for _ in range(length)] for at, length in enumerate(lengths)}
    driver = RandomDriver(executor, seed)
    answers = driver.run(prompts, EVERYTHING, NUM_OUTPUTS)
    executor.shutdown()
    for name, prompt in prompts.items():
        expected = logits_of_generate(tiny, prompt, [token.token_id for token in answers[name]])
        difference = float((ours(answers[name]) - expected).abs().max())
        text = [*prompt, *(token.token_id for token in answers[name])]
        assert tiny.beyond_rounding(difference, text) < 1e-4, (seed, len(prompt), difference)


def test_a_table_by_position_is_refused_where_frequencies_change_with_length() -> None:
    rope = read_architecture(CONFIGS["llama-dynamic"].to_dict() | {"architectures": ["LlamaForCausalLM"]}).rope
    frequencies = RopeFrequencies(rope, 8)
    assert frequencies.table(64).cos.shape == (64, 4)
    with pytest.raises(ValueError, match=r"max_model_len=65: rope scaling 'dynamic' changes beyond 64 tokens"):
        frequencies.table(65)


BASE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 10, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_the_original_length_is_found_as_in_transformers() -> None:
    """Beside the scaling, else in it, else max_position_embeddings (transformers 5, standardize_rope_params)."""
    key = "original_max_position_embeddings"
    nested = LLAMA3 | {key: 32}
    for config, expected in (
        ({"rope_scaling": nested, key: 64}, 64), ({"rope_scaling": nested}, 32),
        ({"rope_scaling": LLAMA3, key: 64}, 64), ({"rope_scaling": LLAMA3}, 256),
    ):  # fmt: skip
        assert read_architecture(BASE | config).rope.original_max_positions == expected
        theirs = LlamaConfig(**BASE | copy.deepcopy(config), rope_theta=1e4)
        theirs.standardize_rope_params()  # a model calls it once more, with all attributes there
        assert theirs.rope_parameters[key] == expected


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn"}, "no 'rope_parameters.factor'"),
        ({"rope_type": "proportional"}, "'proportional' is not supported; supported: default, linear, llama3, yarn"),
        ({"rope_type": ["yarn"]}, "is not supported; supported"),
        ({"type": "linear", "factor": 2.0, "mrope_section": [2, 2]}, "rope_parameters.mrope_section"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"full_attention": {"rope_type": "default"}}, "rope_parameters.full_attention"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "more than low_freq_factor=1.0"),
        ({"rope_type": "linear", "factor": float("nan")}, "rope_parameters.factor=nan"),
        ({"rope_type": "linear", "factor": 0}, "rope_parameters.factor=0"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}, "short_factor.*list of 4 numbers"),
        ({"rope_type": "default", "rope_theta": -5.0}, "rope_parameters.rope_theta=-5.0"),
    ],
)
def test_scalings_that_are_not_computed_are_refused_by_name(scaling: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_architecture(BASE | {"rope_scaling": scaling})
