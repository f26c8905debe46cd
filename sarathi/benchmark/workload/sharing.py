"""Requests whose prompts begin alike, and what a cache without limits would find of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sarathi.benchmark.workload.spec import RequestSpec

Link = tuple[int, int, int]  # hash of the chain of blocks before, id and tokens of a block


class PrefixRepetition(NamedTuple):
    """Prompts of one of num_prefixes prefixes and a suffix of their own; lengths in tokens. As in vLLM's benchmark."""

    num_prefixes: int
    prefix_len: int
    suffix_len: int
    output_len: int

    def requests(self, count: int, rng: np.random.Generator) -> list[RequestSpec]:
        """`count` requests at time zero, as many of each prefix as of the others but for one, in random order."""
        prompt = self.prefix_len + self.suffix_len
        prefixes = rng.permutation(np.arange(count) % self.num_prefixes).tolist()
        blocks = [(prefix,) if self.prefix_len else () for prefix in prefixes]
        return [RequestSpec(0.0, prompt, self.output_len, None, block, max(self.prefix_len, 1)) for block in blocks]


class MultiTurn(NamedTuple):
    """Conversations in a closed loop: a turn is sent think_time_s after the answer to the one before.

    shared_len: tokens that all conversations begin with. user_len, output_len: tokens of each question and answer.
    """

    num_turns: int
    shared_len: int
    user_len: int
    output_len: int
    think_time_s: float

    def requests(self, count: int) -> list[RequestSpec]:
        """`count` turns, conversation after conversation; the last one may have fewer."""
        return [self._turn(*divmod(number, self.num_turns)) for number in range(count)]

    def _turn(self, conversation: int, turn: int) -> RequestSpec:
        prompt = self.shared_len + (turn + 1) * self.user_len + turn * self.output_len
        shared = (0,) if self.shared_len else ()
        wait_s = self.think_time_s if turn else 0.0
        return RequestSpec(wait_s, prompt, self.output_len, None, shared, max(self.shared_len, 1), conversation)


def is_later_turn(specs: Sequence[RequestSpec], number: int) -> bool:
    """Whether a request waits for the answer to the one before it."""
    talk = specs[number].conversation
    return talk is not None and number > 0 and specs[number - 1].conversation == talk


class PrefixReuse(NamedTuple):
    """num_repeated: prompt tokens that an earlier request computed; a cache without limits finds all of them.

    num_found: those that the engine's cache had.
    """

    num_prompt_tokens: int = 0
    num_repeated: int = 0
    num_found: int = 0

    @property
    def ideal_rate(self) -> float | None:
        """The share that a cache without limits finds; None where prompts have nothing in common."""
        return self.num_repeated / self.num_prompt_tokens if self.num_repeated else None

    def __str__(self) -> str:
        total = max(self.num_prompt_tokens, 1)
        found, ideal = self.num_found / total, self.num_repeated / total
        return f"prompt tokens found in the cache: {found:.1%}; by a cache without limits: {ideal:.1%}"


def repeated_tokens(specs: Iterable[RequestSpec]) -> PrefixReuse:
    """What a cache without limits would find, if each request came after the end of all before it.

    Text is not compared. The last token of a prompt is always computed, and the last one of an answer never is.
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
    """Tokens of the leading blocks that follow each other in an earlier request too.

    seen: of each block, known by the chain before it, the tokens that were computed: prompts may end inside of one.
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
