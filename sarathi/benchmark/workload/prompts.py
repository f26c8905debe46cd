"""Token ids of a workload's requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sarathi.benchmark.workload.spec import RequestSpec

PROMPT_STREAM, BLOCK_STREAM = 2, 3


class PromptMaker:
    """Prompts that depend only on the seed and the request's number.

    vocab_size: ids are uniform below it. encode: text to ids, for requests with text.
    """

    def __init__(self, seed: int, vocab_size: int, encode: Callable[[str], list[int]] | None = None) -> None:
        self._seed, self._vocab_size, self._encode = seed, vocab_size, encode

    def token_ids(self, spec: RequestSpec, number: int, before: Sequence[int] = ()) -> list[int]:
        """The prompt's token ids. before: the conversation up to this turn."""
        if spec.text is not None and self._encode is not None:
            return self._encode(spec.text)
        blocks = (self._draw(spec.block_tokens, BLOCK_STREAM, block_id) for block_id in spec.block_ids)
        shared = list(before) or [token for block in blocks for token in block][: spec.num_prefill_tokens]
        return shared + self._draw(spec.num_prefill_tokens - len(shared), PROMPT_STREAM, number)

    def _draw(self, count: int, stream: int, number: int) -> list[int]:
        rng = np.random.default_rng([self._seed, stream, number])
        ids: list[int] = rng.integers(0, self._vocab_size, count).tolist()
        return ids
