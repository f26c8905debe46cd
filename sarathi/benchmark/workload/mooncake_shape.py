"""Synthetic requests that resemble Mooncake's conversation trace, which is not shipped.

Published (Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025, table of workloads): 12,031
requests in an hour, prompts of 12,035 tokens and outputs of 343 on average, 40 % of prompt tokens repeated, in blocks
of 512. Not published, but assumed: the rest of the distributions below.
"""

from __future__ import annotations

import numpy as np

from sarathi.benchmark.workload.spec import RequestSpec

_REQUESTS_PER_S = 12_031 / 3600
_BLOCK_TOKENS = 512
_GOES_ON = 0.39  # share of requests that are a later turn of a conversation
_OPEN_TALKS = 100  # conversations that may go on: the newest
_FIRST_TOKENS, _FIRST_SIGMA = 5_500, 1.1  # of a first turn: median, and sigma of its logarithm
_MORE_TOKENS, _MORE_SIGMA = 1_900, 1.2  # of what a later turn adds, the last answer included
_OUTPUT_TOKENS, _OUTPUT_SIGMA = 250, 0.8
_MOST_TOKENS = 120_000


def mooncake_like(count: int, rng: np.random.Generator) -> list[RequestSpec]:
    """`count` requests in order of arrival. All begin with block 0."""
    times = np.cumsum(rng.exponential(1 / _REQUESTS_PER_S, count))
    talks: list[tuple[tuple[int, ...], int]] = []  # blocks and tokens of each conversation so far
    specs, num_blocks = [], 1
    for at_s in times - times[0]:
        open_talks = min(len(talks), _OPEN_TALKS)
        goes_on = bool(open_talks) and rng.random() < _GOES_ON
        blocks, tokens = talks.pop(-int(rng.integers(1, open_talks + 1))) if goes_on else ((0,), 0)
        median, sigma = (_MORE_TOKENS, _MORE_SIGMA) if goes_on else (_FIRST_TOKENS, _FIRST_SIGMA)
        tokens = min(tokens + int(rng.lognormal(np.log(median), sigma)) + 1, _MOST_TOKENS)
        missing = max(-(-tokens // _BLOCK_TOKENS) - len(blocks), 0)
        blocks = (*blocks, *range(num_blocks, num_blocks + missing))
        num_blocks += missing
        output = int(rng.lognormal(np.log(_OUTPUT_TOKENS), _OUTPUT_SIGMA)) + 1
        specs.append(RequestSpec(float(at_s), tokens, output, None, blocks, _BLOCK_TOKENS))
        talks.append((blocks[: tokens // _BLOCK_TOKENS], tokens))
    return specs
