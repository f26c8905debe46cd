"""Simulated prefix caching: all is found where all fits, and less where it does not."""

import numpy as np

from sarathi.benchmark.engines.simulation import SimulatedCache, distinct_tokens, simulate, with_short_outputs
from sarathi.benchmark.workload.mooncake_shape import mooncake_like
from sarathi.benchmark.workload.sharing import repeated_tokens

SEED = 0  # set anew for each test: see tests/conftest.py


def test_a_cache_with_room_finds_what_one_without_limits_does() -> None:
    print(f"seed {SEED}")
    specs = with_short_outputs(mooncake_like(30, np.random.default_rng(SEED)), 64)
    tokens = distinct_tokens(specs)
    room = simulate(specs, SimulatedCache(2 * tokens, max_num_seqs=32))
    assert room[:2] == repeated_tokens(specs)[:2] and 0.95 * room.num_repeated <= room.num_found <= room.num_repeated
    longest = max(spec.num_tokens for spec in specs)
    short = simulate(specs, SimulatedCache(max(2 * longest, tokens // 8), max_num_seqs=32))
    assert short.num_found <= room.num_found


def test_the_shape_is_the_published_one() -> None:
    """Means of prompts and outputs, and the share of repeated tokens, within a fifth; of as many as the trace has."""
    print(f"seed {SEED}")
    specs = mooncake_like(12_031, np.random.default_rng(SEED))
    reuse = repeated_tokens(specs)
    assert abs(np.mean([spec.num_prefill_tokens for spec in specs]) / 12_035 - 1) < 0.2
    assert abs(np.mean([spec.num_decode_tokens for spec in specs]) / 343 - 1) < 0.2
    assert abs(reuse.num_repeated / reuse.num_prompt_tokens / 0.4 - 1) < 0.2
