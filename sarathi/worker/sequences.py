"""What a worker keeps of each request: its tokens and how to sample; knows no memory, no text, no order of service."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from sarathi.messages import NewRequest, SampledToken
from sarathi.sampling_params import SamplingParams
from sarathi.worker.pending_tokens import placeholder_token

_MASK = 2**64 - 1


def token_array(token_ids: Iterable[int] = ()) -> array[int]:
    """Token ids side by side in memory, int64: what samples looks at all of a sequence's tokens in every step."""
    return array("q", token_ids)


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and output of one request; outputs are appended as they are sampled and survive preemption."""

    token_ids: array[int]
    num_prompt_tokens: int
    params: SamplingParams
    eos_token_ids: frozenset[int]
    seed: int

    def tokens(self, first: int, end: int, home: int) -> array[int]:
        """Tokens [first, end), with a stand-in for the last one where it is sampled but known to the device alone.

        home: where the device keeps that one.
        """
        tokens = self.token_ids[first:end]
        if len(self.token_ids) < end:
            tokens.append(placeholder_token(home))
        return tokens

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) of the token at `position`: of it and the seed alone, whoever shares the batch.

        SplitMix64 (Steele, Lea and Flood, 2014), jumped to the position.
        """
        bits = (self.seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((bits ^ (bits >> 31)) >> 11) * 2.0**-53


class SequenceTable:
    """The sequences of all requests that the worker was told of and not yet told to forget."""

    def __init__(self, seed: int) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._seeds = random.Random(seed)

    def __getitem__(self, request_id: str) -> Sequence:
        return self._sequences[request_id]

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, requests: Iterable[NewRequest]) -> None:
        """Requests without a seed get one from the engine's, in the order they come."""
        for new in requests:
            params = new.sampling_params
            seed = self._seeds.getrandbits(64) if params.seed is None else _scrambled(params.seed)
            tokens = token_array(new.token_ids)
            self._sequences[new.request_id] = Sequence(tokens, len(tokens), params, new.eos_token_ids, seed)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forgets requests; unknown ones were never sent."""
        for request_id in request_ids:
            self._sequences.pop(request_id, None)

    def append(self, tokens: Iterable[SampledToken]) -> None:
        """What was sampled is what comes next."""
        for token in tokens:
            self._sequences[token.request_id].token_ids.append(token.token_id)


def _scrambled(seed: int) -> int:
    """Neighbouring seeds must not give neighbouring streams, nor -7 that of 7: Random takes a seed's absolute value."""
    return random.Random(seed & _MASK).getrandbits(64)
