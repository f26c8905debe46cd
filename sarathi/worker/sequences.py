"""Tokens and sampling parameters of a worker's requests."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from sarathi.messages import NOT_FINITE, Chunk, NewRequest, SampledToken
from sarathi.model_executor.ops.types import placeholder_token
from sarathi.model_executor.sampling.grammar import GrammarCompiler, GrammarMatcher
from sarathi.model_executor.sampling.logprobs import PromptSpan
from sarathi.model_executor.sampling.plan import NextToken, counts_all, counts_output
from sarathi.sampling_params import SamplingParams

_MASK = 2**64 - 1
_NO_TOKENS = array("q")  # as all token ids here: contiguous int64, which torch.frombuffer can read


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and output of one request. Output tokens are appended as they are sampled, and survive preemption."""

    token_ids: array[int]
    num_prompt_tokens: int
    params: SamplingParams
    eos_token_ids: frozenset[int]
    seed: int
    grammar: GrammarMatcher | None = None

    @property
    def output_token_ids(self) -> array[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def tokens(self, first: int, end: int, slot: int = 0) -> array[int]:
        """Tokens [first, end), with a placeholder of `slot` for the last one where the host does not know it yet."""
        tokens = self.token_ids[first:end]
        if len(self.token_ids) < end:
            tokens.append(placeholder_token(slot))
        return tokens

    def next_token(self, position: int, slot: int = 0) -> NextToken:
        """Inputs for sampling the token at `position`, the number of tokens before it; slot: see `tokens`."""
        params = self.params
        return NextToken(
            params,
            self.eos_token_ids,
            position - self.num_prompt_tokens,
            0.0 if params.is_greedy else self.uniform(position),
            self._counted_tokens(position, slot),
        )

    def _counted_tokens(self, position: int, slot: int) -> array[int]:
        if counts_all(self.params) or self.params.needs_host_tokens:
            return self.tokens(0, position, slot)
        return self.tokens(self.num_prompt_tokens, position, slot) if counts_output(self.params) else _NO_TOKENS

    def prompt_span(self, chunk: Chunk) -> PromptSpan | None:
        """The prompt tokens that the chunk's logits are about, where their log probabilities are wanted.

        The logits at a position are about the token behind it: none of them are about the first token.
        """
        num_top, end = self.params.prompt_logprobs, min(chunk.start + chunk.num_tokens + 1, self.num_prompt_tokens)
        if num_top is None or end <= chunk.start + 1:
            return None
        return PromptSpan(chunk.request_id, chunk.start + 1, self.token_ids[chunk.start + 1 : end], num_top)

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) of the token at `position`: a function of seed and position alone.

        SplitMix64 (Steele, Lea and Flood, 2014), jumped to the position.
        """
        bits = (self.seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((bits ^ (bits >> 31)) >> 11) * 2.0**-53


class SequenceTable(dict[str, Sequence]):
    """The sequence of every request from its first step until it is dropped."""

    def __init__(self, seed: int, grammars: GrammarCompiler | None = None) -> None:
        """grammars: None on a rank that samples nothing.

        not_finite: requests whose keys and values may be NaN, since their logits were.
        """
        super().__init__()
        self.not_finite: set[str] = set()
        self._seeds = random.Random(seed)
        self._grammars = grammars

    def add(self, requests: Iterable[NewRequest]) -> None:
        """Add requests. Those without a seed get one from the engine's generator, in order of arrival."""
        for new in requests:
            params = new.sampling_params
            seed = self._seeds.getrandbits(64) if params.seed is None else _scrambled(params.seed)
            tokens = array("q", new.token_ids)
            sequence = Sequence(tokens, len(tokens), params, new.eos_token_ids, seed)
            if params.structured_outputs is not None and self._grammars is not None:
                sequence.grammar = self._grammars.start(params.structured_outputs)
            self[new.request_id] = sequence

    def tokens(self, chunks: Iterable[Chunk], slots: Iterable[int]) -> array[int]:
        """The chunks' tokens, concatenated, with placeholder tokens for those that the host does not know yet."""
        tokens = array("q")
        for chunk, slot in zip(chunks, slots, strict=True):
            tokens += self[chunk.request_id].tokens(chunk.start, chunk.start + chunk.num_tokens, slot)
        return tokens

    def drop(self, request_ids: Iterable[str]) -> None:
        """Remove requests; unknown ids are ignored."""
        for request_id in request_ids:
            self.pop(request_id, None)
            self.not_finite.discard(request_id)

    def append(self, tokens: Iterable[SampledToken]) -> None:
        """Append sampled tokens to their requests; 0 where no token could be drawn, with which a request ends."""
        for token in tokens:
            self[token.request_id].token_ids.append(max(token.token_id, 0))
            if token.token_id == NOT_FINITE:
                self.not_finite.add(token.request_id)

    def token_masks(self, limited: Iterable[Sequence]) -> Tensor:
        """What their grammars allow next, see `GrammarCompiler.masks`; the host knows all tokens so far."""
        matchers = []
        for sequence in limited:
            assert sequence.grammar is not None
            sequence.grammar.advance(sequence.output_token_ids)
            matchers.append(sequence.grammar)
        assert self._grammars is not None
        return self._grammars.masks(matchers)


def _scrambled(seed: int) -> int:
    """A seed whose neighbours give unrelated streams; -7 differs from 7, of which Random takes the absolute value."""
    return random.Random(seed & _MASK).getrandbits(64)
