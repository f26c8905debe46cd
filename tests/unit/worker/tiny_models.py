"""Tiny random models of every family, as transformers builds and saves them: the reference for ours."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from sarathi.messages import SampledToken
from sarathi.model_executor.placement import Placement
from sarathi.sampling_params import SamplingParams
from sarathi.worker import worker

VOCAB_SIZE = 97
EVERYTHING = SamplingParams(temperature=0.0, logprobs=VOCAB_SIZE, max_tokens=64)
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

_YARN = {"rope_type": "yarn", "rope_theta": 900.0, "factor": 4.0, "original_max_position_embeddings": 64}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 900.0, "factor": 4.0}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 900.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 3.0, 5.0, 9.0],
}  # fmt: skip

CONFIGS: dict[str, PretrainedConfig] = {
    "llama2": LlamaConfig(**_SHAPE),
    "llama-with-biases": LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "llama3.1": LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE),
    "llama-linear": LlamaConfig(**_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
    "llama-yarn": LlamaConfig(**_SHAPE, rope_parameters=_YARN),
    "llama-dynamic": LlamaConfig(**{**_SHAPE, "max_position_embeddings": 64}, rope_parameters=_DYNAMIC),
    "llama-longrope": LlamaConfig(**_SHAPE, rope_parameters=_LONGROPE),
    "qwen2-yarn": Qwen2Config(**_SHAPE, rope_parameters=_YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}),
    "smollm2": LlamaConfig(**_SHAPE, tie_word_embeddings=True, head_dim=8),
    "yi": LlamaConfig(**{**_SHAPE, "num_key_value_heads": 1}, rope_theta=1e7),
    "mistral": MistralConfig(**_SHAPE, sliding_window=7),
    "mistral-without-window": MistralConfig(**_SHAPE, sliding_window=None, head_dim=16),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen2-windowed": Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**{**_SHAPE, "num_key_value_heads": 3}, head_dim=16),
}


@dataclass(eq=False)
class TinyModel:
    """A saved model and what transformers computes with it."""

    folder: Path
    reference: torch.nn.Module

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """[len(token_ids), VOCAB_SIZE] float32: the next token's distribution at every position."""
        return self.reference(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    def beyond_rounding(self, difference: float, token_ids: list[int]) -> float:
        """What is left of a difference of log probabilities in a text that float32 moves far in transformers too.

        One text of thousands is like that; the others lie within 1e-4, and leave a difference as it is.
        """
        if difference < 1e-4:
            return difference
        exact = TinyModel(self.folder, copy.deepcopy(self.reference).double())
        rounding = (self.logprobs(token_ids) - exact.logprobs(token_ids)).abs().max()
        return max(0.0, difference - 4 * float(rounding))


def build(name: str, folder: Path, **changes: Any) -> TinyModel:
    """Weights large enough that every part of the model matters, in several shards. changes: of the configuration."""
    torch.manual_seed(sum(name.encode()))
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in parameter_name else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.25)
    model.save_pretrained(folder, max_shard_size="40KB")
    return TinyModel(folder, model)


def compute_in_float64(patch: pytest.MonkeyPatch) -> None:
    """Workers of this process and of its forks, on the CPU: for tests that compare tokens of random requests. Ranks in
    processes of their own stay in float32.

    In float32, logits of other batch shapes differ by 1e-5: one of 50,000 greedy tokens and one of 200,000 drawn ones
    hang on that.
    """
    patch.setattr(worker, "choose_placement", lambda config, arch: Placement(torch.float64, torch.device("cpu")))


def random_prompts(seed: int, count: int, longest: int) -> Iterator[tuple[str, list[int]]]:
    """Names and token ids."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        yield f"r{index}", torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


def largest_difference(tiny: TinyModel, prompt: list[int], tokens: list[SampledToken]) -> float:
    """Of log probabilities of all tokens at the positions of an output, beyond what rounding does to transformers.

    The request's parameters are EVERYTHING.
    """
    outputs = [token.token_id for token in tokens]
    expected = tiny.logprobs(prompt + outputs[:-1])[len(prompt) - 1 :]
    found = torch.empty_like(expected)
    for row, token in zip(found, tokens, strict=True):
        ids, values = zip(*token.top_logprobs, strict=True)
        row[list(ids)] = torch.tensor(values)
        assert token.logprob == values[0] and token.token_id == ids[0]
    return tiny.beyond_rounding(float((found - expected).abs().max()), prompt + outputs[:-1])
