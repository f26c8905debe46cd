"""Prompts computed in one process and continued in another, against transformers; memory held while it leaves."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_helpers import expected_outputs, settings_for
from tiny_models import build, random_prompts
from transfer_side import CHUNK, OUTPUTS

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk
from sarathi.worker.cache_engine.base import KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine

LAYERS, BLOCK = 3, 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb", f"sdpa_paged_{BLOCK}"])
def test_what_one_worker_prefills_another_decodes(backend: str, tmp_path: Path) -> None:
    model = build("llama2", tmp_path)
    prompts = [prompt for _, prompt in random_prompts(11, 5, 60)]
    settings, port = settings_for(model, attention_backend=backend), free_port()
    side = Path(__file__).with_name("transfer_side.py")
    words = [str(port), json.dumps(settings), json.dumps(prompts)]
    processes = [
        subprocess.Popen([sys.executable, side, str(number), *words], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    counts, outputs = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert outputs == expected_outputs(model, prompts, OUTPUTS)
    chunks = [-(-len(prompt) // CHUNK) for prompt in prompts]
    if "megacache" in backend:
        assert counts == [2 * number for number in chunks]
    elif "vattn" in backend:
        assert counts == [2 * LAYERS * number for number in chunks]
    else:
        assert counts == [2 * LAYERS * -(-len(prompt) // BLOCK) for prompt in prompts]


@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb"])
def test_memory_that_is_held_is_neither_unmapped_nor_reused(backend: str) -> None:
    spec = KVCacheSpec(LAYERS, 2, 8, torch.float32, max_num_seqs=2, max_model_len=256)
    cache = create_cache_engine(BackendSpec.parse(backend), spec, torch.device("cpu"), 2**20)
    cache.prepare([Chunk("a", 0, 100, True, 100)])
    ranges = [each for layer in cache.ranges("a", 0, 100) for each in layer]
    assert len(ranges) == (2 if "megacache" in backend else 2 * LAYERS)
    assert sum(each.nbytes for each in ranges) == 100 * spec.token_bytes
    for number, each in enumerate(ranges):
        each.fill_(number + 1)
    held = cache.hold("a")
    cache.release(["a"])
    cache.prepare([Chunk("b", 0, 200, True, 200)])
    for layer in cache.ranges("b", 0, 200):
        for each in layer:
            each.fill_(-1)
    assert all(bool((each == number + 1).all()) for number, each in enumerate(ranges))
    cache.let_go(held)
    cache.prepare([Chunk("c", 0, 100, True, 100)])  # there are two slots
    cache.check_integrity()
    cache.close()
