"""Turns callers' prompts and parameters into core requests: validates, tokenizes, makes one request per completion.

A request that passes these checks and the scheduler's length check cannot affect other requests in its batch.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import numpy

from sarathi.containers import is_integer, is_list
from sarathi.engine.tokenizer.chat_template import Conversation, check_template_names
from sarathi.engine.tokenizer.tokenizer import Tokenizer, UnencodableTextError
from sarathi.engine.tokenizer.vocabulary import make_vocabulary
from sarathi.messages import NewRequest
from sarathi.sampling_params import SamplingParams
from sarathi.structured_outputs import StructuredOutputsParams, check_grammar
from sarathi.wording import short_repr

Prompt = str | Sequence[int]
AnyPrompt = Prompt | Mapping[str, Any]
Prompts = AnyPrompt | Sequence[AnyPrompt]
Params = SamplingParams | Sequence[SamplingParams] | None
_GRAMMAR_CACHE_SIZE = 256
_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: nearby seeds and indices do not collide


class InputProcessor:
    """Validates against one model's vocabulary and tokenizer (None: the model has no tokenizer).

    ValueError if an end token is outside the vocabulary: the tokenizer then belongs to another model.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._end_token_ids = tokenizer, end_token_ids
        self._vocab_size = vocab_size
        self._grammars = _GrammarValidator(tokenizer, vocab_size, end_token_ids)
        self._check_ids("eos_token_id", end_token_ids)

    def process(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[NewRequest]:
        """One request per completion (params.n). The first has the given id, the others `id#1`, `id#2`, ...

        priority: lower values run first; a signed 32-bit integer.
        Raises ValueError for a prompt that is empty or neither text nor token ids, for text that cannot be encoded, for
        a token id outside the vocabulary, and for parameters that the model does not support.
        """
        ids = self._token_ids(prompt)
        if not -(2**31) <= priority < 2**31:
            raise ValueError(f"priority is {short_repr(priority)}: it must be from {-(2**31)} to {2**31 - 1}")
        if not ids:
            raise ValueError(f"the prompt is empty ({prompt!r}); it must hold at least one token")
        values = numpy.frombuffer(ids, numpy.int64)  # min() and max() of an array take 3 ms for 32K tokens
        self._check_range("prompt", int(values.min()), int(values.max()))
        params = self._validate(params)
        single = params if params.n == 1 else replace(params, n=1)
        first = NewRequest(request_id, ids, single, self._end_token_ids, priority)
        return [first, *(_completion(first, index) for index in range(1, params.n))]

    def _validate(self, params: SamplingParams) -> SamplingParams:
        """Validate the parameters against the model; return them with bad words as token ids."""
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop is {params.stop!r}: this model has no tokenizer, use stop_token_ids")
        if params.structured_outputs is not None:
            self._grammars.check(params.structured_outputs)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self._vocab_size:
                raise ValueError(f"{name} is {getattr(params, name)}: the vocabulary has {self._vocab_size} tokens")
        if params.bad_words:
            words = [ids for word in params.bad_words for ids in self._encodings(word)]
            params = replace(params, bad_words=words)
            self._check_ids("bad_words", itertools.chain(*words))
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            if ids := getattr(params, name):
                self._check_ids(name, ids)
        if params.bad_words or params.min_tokens:
            self._check_choice(params)
        return params

    def _check_choice(self, params: SamplingParams) -> None:
        """ValueError if no token is allowed as the first output token."""
        excluded = {word[0] for word in params.bad_words if len(word) == 1}
        if params.min_tokens:
            excluded.update(params.stop_token_ids, () if params.ignore_eos else self._end_token_ids)
        allowed = params.allowed_token_ids
        if excluded.issuperset(range(self._vocab_size) if allowed is None else allowed):
            raise ValueError(
                f"allowed_token_ids is {short_repr(allowed)}: bad_words and min_tokens (which forbids end tokens) "
                "exclude every allowed token"
            )

    def _encodings(self, word: str | Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Token ids of a bad word at the start of a text, and after a space if only the first token then differs.

        As in vLLM, a word whose number of tokens changes after a space is matched only in its first form.
        """
        if not isinstance(word, str):
            yield tuple(word)
            return
        if self._tokenizer is None:
            raise ValueError(f"bad_words holds {word!r}: this model has no tokenizer, give lists of token ids")
        bare, spaced = (
            tuple(self._tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " ")
        )
        yield bare
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            yield spaced

    def _token_ids(self, prompt: Prompt) -> array[int]:
        """int64, whose range is not checked yet."""
        if isinstance(prompt, str):
            return array("q", self._encode(prompt))
        try:
            if not is_list(prompt) or (len(prompt) and not is_integer(prompt[0])):
                raise TypeError
            return array("q", prompt)
        except TypeError:
            raise ValueError(f"the prompt must be text or a list of token ids, got {short_repr(prompt)}") from None
        except OverflowError:
            self._check_ids("prompt", prompt)
            raise

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ValueError(f"the prompt is text ({text[:40]!r}), but this model has no tokenizer: give token ids")
        try:
            return self._tokenizer.encode(text) if text else []
        except UnencodableTextError as error:
            raise ValueError(f"the prompt holds {error}") from None

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        given = tuple(ids)
        self._check_range(field, min(given, default=0), max(given, default=0))

    def _check_range(self, field: str, least: int, greatest: int) -> None:
        for token_id in (least, greatest):
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(
                    f"{field} holds token id {short_repr(token_id)}: it must be from 0 to {self._vocab_size - 1}"
                )


class _GrammarValidator:
    """Checks whether the model supports a structured output. Caches recent results."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, end_token_ids
        self.check = lru_cache(_GRAMMAR_CACHE_SIZE)(self._check)
        self._vocabulary = cache(self._make_vocabulary)

    def _check(self, limit: StructuredOutputsParams) -> None:
        """ValueError if it does not. Only grammars can name special tokens, so only they need the vocabulary, which
        takes a second to build."""
        for missing, name in ((self._tokenizer is None, "tokenizer"), (not self._end_token_ids, "end token")):
            if missing:
                raise ValueError(f"structured_outputs is given, but this model has no {name}")
        check_grammar(limit, None if limit.grammar is None else self._vocabulary())

    def _make_vocabulary(self) -> Any:
        assert self._tokenizer is not None
        return make_vocabulary(self._tokenizer, self._vocab_size, self._end_token_ids)


def list_prompts(prompts: Prompts) -> Sequence[Any]:
    """One prompt becomes a list of one; a list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not is_list(prompts):
        raise ValueError(f"prompts is {short_repr(prompts)}: it must be text, a list of token ids, or a list of those")
    return [prompts] if len(prompts) and is_integer(prompts[0]) else prompts


def plain_prompt(prompt: Mapping[str, Any]) -> Prompt:
    """The prompt of `{"prompt": ...}` or `{"prompt_token_ids": ...}`."""
    for key, allowed in (("prompt_token_ids", "a list of token ids"), ("prompt", "text")):
        if key in prompt:
            plain: Prompt = prompt[key]
            if not (isinstance(plain, str) if key == "prompt" else is_list(plain)):
                raise ValueError(f"{key} is {short_repr(plain)}: it must be {allowed}")
            return plain
    raise ValueError(f"a prompt given as a dict needs 'prompt' or 'prompt_token_ids', this one has {list(prompt)}")


def params_of_each(params: Params, count: int) -> Sequence[SamplingParams]:
    """The sampling parameters of each of `count` prompts; None: the defaults."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence):
        raise ValueError(
            f"sampling_params is {short_repr(params)}: it must be a SamplingParams, or a list with one for each prompt"
        )
    if len(params) != count:
        raise ValueError(f"sampling_params has {len(params)} entries for {count} prompts; give one for all or one each")
    for number, each in enumerate(params):
        if not isinstance(each, SamplingParams):
            raise ValueError(f"sampling_params[{number}] is {short_repr(each)}: each entry must be a SamplingParams")
    return params


def encode_chat(
    tokenizer: Tokenizer | None, conversation: Conversation, *, chat_template: str | None = None,
    add_generation_prompt: bool = True, continue_final_message: bool = False, tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:  # fmt: skip
    """Token ids of a conversation, up to the assistant's answer.

    Messages are dicts with `role` and `content` (text or a list of text parts). An assistant message with `tool_calls`
    needs no content; messages with role `tool` contain results.

    chat_template: a Jinja template that replaces the model's own.
    add_generation_prompt: end the prompt with the start of an assistant message.
    continue_final_message: leave the last message open so that the model continues it; needs
        add_generation_prompt=False.
    tools: functions that the model may call, as JSON schemas or as Python functions with docstrings.
    chat_template_kwargs: further variables of the template, e.g. `enable_thinking`.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot chat: use generate() with token ids")
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message is True: it needs add_generation_prompt=False")
    names = chat_template_kwargs or {}
    check_template_names(names)
    return tokenizer.encode_chat(
        conversation, chat_template, add_generation_prompt, continue_final_message, tools, **names
    )  # fmt: skip


def _completion(first: NewRequest, index: int) -> NewRequest:
    """Another completion of the same prompt. Its seed is derived from the given one and differs from the others'."""
    seed = first.sampling_params.seed
    if seed is not None:
        seed = (seed + index * _SEED_STRIDE + 2**63) % 2**64 - 2**63  # wraps to a signed 64-bit integer
    params = replace(first.sampling_params, seed=seed, prompt_logprobs=None)  # only the first completion returns them
    return replace(first, request_id=f"{first.request_id}#{index}", sampling_params=params)
