"""Grammars of requests as bitmasks of the tokens that may come next, computed by llguidance."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import torch
from torch import Tensor

from sarathi.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)
MakeVocabulary = Callable[[int], Any]
"""Makes llguidance's LLTokenizer from the model's vocabulary size. Takes about a second."""
_KEPT_GRAMMARS = 64
_MAX_THREADS = 8


def no_vocabulary(vocab_size: int) -> NoReturn:
    """For a model without a tokenizer."""
    raise ValueError("this model has no tokenizer: a grammar has no text to limit")


class GrammarMatcher:
    """The position of one request's output in its grammar.

    llmatcher: None before the first `advance`, and where the grammar could not be compiled.
    error: why no token may follow; None if there is no error.
    """

    def __init__(self, compiled: Future[Any]) -> None:
        """compiled: an LLMatcher at the grammar's beginning."""
        self._compiled = compiled
        self._num_consumed = 0
        self.llmatcher: Any = None
        self.error: str | None = None

    def advance(self, output_token_ids: Sequence[int]) -> None:
        """Advance over the output's tokens so far, earlier ones included. Waits for the grammar to be compiled."""
        if self.llmatcher is None:
            self._begin()
        new = list(output_token_ids[self._num_consumed :])
        self._num_consumed = len(output_token_ids)
        if self.error is None and new and not self.llmatcher.is_stopped():
            self.llmatcher.consume_tokens(new)

    def _begin(self) -> None:
        try:
            self.llmatcher = self._compiled.result().deep_copy()
        except Exception as error:  # ends this request alone
            self.error = f"{type(error).__name__}: {error}"


class GrammarCompiler:
    """Compiles grammars in a thread of its own; the first one loads the vocabulary."""

    def __init__(self, vocab_size: int, make_vocabulary: MakeVocabulary = no_vocabulary) -> None:
        self._vocab_size, self._make_vocabulary = vocab_size, make_vocabulary
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiled: OrderedDict[StructuredOutputsParams, Future[Any]] = OrderedDict()
        self._vocabulary: Any = None
        self._executor: Any = None

    def start(self, limit: StructuredOutputsParams) -> GrammarMatcher:
        """The matcher of a new request. Returns at once."""
        future = self._compiled.pop(limit, None) or self._thread.submit(self._compile, limit)
        self._compiled[limit] = future
        if len(self._compiled) > _KEPT_GRAMMARS:
            self._compiled.popitem(last=False)
        return GrammarMatcher(future)

    def masks(self, matchers: Sequence[GrammarMatcher]) -> Tensor:
        """[matchers, ceil(vocab_size / 32)] int32 on the CPU: bit i of word w says whether token 32 * w + i may follow.

        A matcher that failed allows no token; the reason is logged.
        """
        bits = torch.zeros((len(matchers), -(-self._vocab_size // 32)), dtype=torch.int32)
        live = [(each.llmatcher, row) for row, each in enumerate(matchers) if each.error is None]
        self._threads().unsafe_compute_mask_ptr(live, bits.data_ptr(), 4 * bits.shape[1], len(bits))
        for matcher, row in zip(matchers, bits, strict=True):
            if matcher.error is None and matcher.llmatcher.is_error():
                matcher.error = matcher.llmatcher.get_error()
            if matcher.error is not None:
                logger.warning("a grammar failed, and its request with it: %s", matcher.error)
                row.zero_()
        return bits

    def _threads(self) -> Any:
        if self._executor is None:
            import llguidance

            self._executor = llguidance.LLExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
        return self._executor

    def _compile(self, limit: StructuredOutputsParams) -> Any:
        import llguidance

        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary(self._vocab_size)
        return llguidance.LLMatcher(self._vocabulary, limit.llguidance_grammar(), log_level=0)
