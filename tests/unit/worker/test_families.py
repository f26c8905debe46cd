"""Every family, on every backend, in random mixed batches: the distributions of all outputs equal transformers' own."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_driver import RandomDriver
from tiny_models import CONFIGS, EVERYTHING, VOCAB_SIZE, TinyModel, build, largest_difference, random_prompts

from sarathi.config.load import make_config
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.model_executor.models import decoder

BACKENDS = ("sdpa_paged_16", "sdpa_paged_3", "sdpa_vattn", "sdpa_vattn_sync_4kb", "sdpa_vattn_megacache_8kb")


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request, tmp_path_factory) -> TinyModel:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def executor_for(tiny: TinyModel, backend: str, **settings) -> UniprocExecutor:
    return UniprocExecutor(
        make_config(
            model=str(tiny.folder),
            attention_backend=backend,
            device="cpu",
            memory_bytes=2**22,
            max_num_seqs=8,
            **settings,
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_equal_transformers(tiny: TinyModel, backend: str) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    executor = executor_for(tiny, backend)
    driver = RandomDriver(executor, seed)
    prompts = dict(random_prompts(seed, 6, 40))
    tokens = driver.run(prompts, EVERYTHING, 5)
    executor.shutdown()
    differences = {name: largest_difference(tiny, prompt, tokens[name]) for name, prompt in prompts.items()}
    assert max(differences.values()) < 1e-4, (seed, differences)


def test_a_rope_table_that_grows_by_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To twice its rows or what a step needs, and never past the longest sequence."""
    monkeypatch.setattr(decoder, "_CPU_ROPE_POSITIONS", 5)
    tiny, seed = build("llama2", tmp_path), random.randrange(2**31)
    print(f"seed {seed}")
    executor = executor_for(tiny, "sdpa_vattn", max_model_len=120)
    driver = RandomDriver(executor, seed)
    prompts = {"long": random_tokens(seed, 70), "short": random_tokens(seed + 1, 3)}
    tokens = driver.run(prompts, replace(EVERYTHING, max_tokens=48), 48)
    num_rows = len(executor.model._rope_table.cos)
    executor.shutdown()
    differences = {name: largest_difference(tiny, prompt, tokens[name]) for name, prompt in prompts.items()}
    assert max(differences.values()) < 1e-4, (seed, differences)
    assert num_rows == 120


def random_tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
