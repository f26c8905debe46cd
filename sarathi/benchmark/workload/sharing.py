"""Requests with shared prompt prefixes, and the hit rate of an unlimited cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sarathi.benchmark.workload.spec import RequestSpec

Link = tuple[int, int, int]  # hash of the chain of blocks before, id and tokens of a block


class PrefixRepetition(NamedTuple):
    """Prompts of one of num_prefixes prefixes and a unique suffix, as in vLLM's benchmark. Lengths in tokens."""

    num_prefixes: int
    prefix_len: int
    suffix_len: int
    output_len: int

    def requests(self, count: int, rng: np.random.Generator) -> list[RequestSpec]:
        """`count` requests at time zero, in random order, spread evenly over the prefixes."""
        prompt = self.prefix_len + self.suffix_len
        prefixes = rng.permutation(np.arange(count) % self.num_prefixes).tolist()
        blocks = [(prefix,) if self.prefix_len else () for prefix in prefixes]
        return [RequestSpec(0.0, prompt, self.output_len, None, block, max(self.prefix_len, 1)) for block in blocks]


class MultiTurn(NamedTuple):
    """Conversations in a closed loop: a turn is sent think_time_s after the previous answer.

    shared_len: tokens of a prefix common to all. user_len, output_len: tokens of each question and answer.
    """

    num_turns: int
    shared_len: int
    user_len: int
    output_len: int
    think_time_s: float

    def requests(self, count: int) -> list[RequestSpec]:
        """`count` turns, grouped by conversation; the last one may have fewer turns."""
        return [self._turn(*divmod(number, self.num_turns)) for number in range(count)]

    def _turn(self, conversation: int, turn: int) -> RequestSpec:
        prompt = self.shared_len + (turn + 1) * self.user_len + turn * self.output_len
        shared = (0,) if self.shared_len else ()
        wait_s = self.think_time_s if turn else 0.0
        return RequestSpec(wait_s, prompt, self.output_len, None, shared, max(self.shared_len, 1), conversation)


def is_later_turn(specs: Sequence[RequestSpec], number: int) -> bool:
    """Whether a request waits for the answer to the previous one."""
    talk = specs[number].conversation
    return talk is not None and number > 0 and specs[number - 1].conversation == talk


class PrefixReuse(NamedTuple):
    """num_repeated: prompt tokens that an earlier request computed: hits of an unlimited cache.

    num_found: hits of the engine's cache.
    """

    num_prompt_tokens: int = 0
    num_repeated: int = 0
    num_found: int = 0

    @property
    def ideal_rate(self) -> float | None:
        """Hit rate of an unlimited cache; None if prompts share nothing."""
        return self.num_repeated / self.num_prompt_tokens if self.num_repeated else None

    def __str__(self) -> str:
        total = max(self.num_prompt_tokens, 1)
        found, ideal = self.num_found / total, self.num_repeated / total
        return f"prompt tokens found in the cache: {found:.1%}; by a cache without limits: {ideal:.1%}"


def repeated_tokens(specs: Iterable[RequestSpec]) -> PrefixReuse:
    """Hits of an unlimited cache if each request arrives after the end of all previous ones.

    Text is not compared. The last token of a prompt is always computed, the last one of an answer never.
    """
    seen: dict[Link, int] = {}
    lengths: dict[int, int] = {}  # of each conversation so far
    total = repeated = 0
    for spec in specs:
        known = _known_tokens(spec, seen)
        if spec.conversation is not None:
            known = max(known, lengths.get(spec.conversation, 0) - 1)
            lengths[spec.conversation] = spec.num_tokens
        total += spec.num_prefill_tokens
        repeated += min(known, spec.num_prefill_tokens - 1)
    return PrefixReuse(total, repeated)


def _known_tokens(spec: RequestSpec, seen: dict[Link, int]) -> int:
    """Tokens of the leading blocks that an earlier request had in the same order.

    seen: hash of the chain up to a block -> its computed tokens; a prompt may end within a block.
    """
    chain, known, is_known = 0, 0, True
    for at, block_id in enumerate(spec.block_ids):
        length = min(spec.block_tokens, spec.num_prefill_tokens - at * spec.block_tokens)
        if length <= 0:
            break
        link = (chain, block_id, spec.block_tokens)
        computed = seen.get(link, 0)
        known += min(computed, length) if is_known else 0
        is_known = is_known and computed == spec.block_tokens
        seen[link] = max(computed, length)
        chain = hash(link)
    return known
