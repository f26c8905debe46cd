"""Weights in mapped memory: the same decoder, at the same addresses, with the same weights after they were dropped."""

import random
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from random_driver import RandomDriver
from tiny_models import EVERYTHING, TinyModel, build, largest_difference, random_prompts

from sarathi.config.load import make_config
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.worker import model_builder
from sarathi.worker.memory import MemoryLimitError
from vattention import Arena

FAMILIES = ("llama-with-biases", "smollm2", "qwen2", "qwen3")


def executor_for(model: Path, **settings: object) -> UniprocExecutor:
    defaults = {"attention_backend": "sdpa_vattn", "device": "cpu", "memory_bytes": 2**22, "max_num_seqs": 8}
    return UniprocExecutor(make_config(model=str(model), mapped_weights=True, **defaults | settings))


def arena_of(executor: UniprocExecutor) -> Arena:
    return executor.model.place.arena


def check_logits(executor: UniprocExecutor, tiny: TinyModel) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    prompts = dict(random_prompts(seed, 4, 30))
    tokens = RandomDriver(executor, seed).run(prompts, EVERYTHING, 4)
    assert max(largest_difference(tiny, prompt, tokens[name]) for name, prompt in prompts.items()) < 1e-4


def check_reload(executor: UniprocExecutor) -> None:
    """Every tensor has its address and its contents again, and had no memory in between."""
    model, arena = executor.model, arena_of(executor)
    parameters = dict(model.parameters())
    copies = {name: tensor.clone() for name, tensor in parameters.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    assert sum(tensor.numel() * tensor.itemsize for tensor in parameters.values()) <= arena.created_bytes
    for _ in range(2):
        executor.drop_weights()
        executor.drop_weights()
        assert not arena.is_mapped and arena.created_bytes <= arena.page_bytes
        executor.load_weights()
        executor.load_weights()
        assert executor.model is model
        assert {name: tensor.data_ptr() for name, tensor in model.parameters()} == addresses
        assert all(parameters[name].equal(copy) for name, copy in copies.items())
        arena.check_integrity()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_weight_is_read_again(name: str, tmp_path: Path) -> None:
    tiny = build(name, tmp_path)
    executor = executor_for(tmp_path)
    check_logits(executor, tiny)
    check_reload(executor)
    check_logits(executor, tiny)
    executor.shutdown()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_weights_are_drawn_again(dtype: str, tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    executor = executor_for(tmp_path, load_format="dummy", dtype=dtype, seed=random.randrange(2**31))
    check_reload(executor)
    executor.shutdown()


def test_a_gguf_file_is_read_again(tmp_path: Path) -> None:
    tiny = build("smollm2", tmp_path)
    write_gguf(tiny, "smollm2", tmp_path / "m.gguf")
    executor = executor_for(tmp_path / "m.gguf")
    check_reload(executor)
    check_logits(executor, tiny)
    executor.shutdown()


def test_weights_that_cannot_be_read_leave_nothing_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llama2", tmp_path)
    executor, shards = executor_for(tmp_path), sorted(tmp_path.glob("*.safetensors"))
    arena = arena_of(executor)
    executor.drop_weights()
    with monkeypatch.context() as patch:
        patch.setattr(model_builder, "check_weights", refuse)
        with pytest.raises(MemoryLimitError, match="do not fit"):
            executor.load_weights()
    content = shards[-1].read_bytes()
    shards[-1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=shards[-1].name):
        executor.load_weights()
    assert not arena.is_mapped and arena.created_bytes <= arena.page_bytes
    shards[-1].write_bytes(content)
    executor.load_weights()
    check_logits(executor, tiny)
    executor.shutdown()


def refuse(num_parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    raise MemoryLimitError("the model's weights do not fit")
