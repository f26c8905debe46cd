"""How the tokens of one request are chosen, when it ends, and what of it is shown."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sarathi.structured_outputs import StructuredOutputsParams
from sarathi.wording import short_repr

_INT64 = (-(2**63), 2**63 - 1)
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_LEAST_TEMPERATURE = 1e-5  # vLLM's limit too: below it a division could leave float32, and the draw is an argmax anyway
_MOST_COMPLETIONS = 2**14
_LISTS = {"stop_token_ids": "token ids", "bad_words": "strings", "logits_processors": "functions"}
_SWITCHES = (
    "ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request, by the names that users of vLLM know; checked when built.

    Raises ValueError naming the field, the value and what is allowed.

    n: completions of the prompt, at most 16384.
    temperature: 0, and all below 1e-5, takes the most likely token (argmax); larger values flatten the distribution.
    top_p, top_k, min_p: limit the tokens to draw from; 1.0, -1 (or 0) and 0.0 switch each off.
    presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, in [-2, 2].
    repetition_penalty: divides positive (multiplies negative) logits of tokens in prompt and output; in [1e-10, 1e10].
    seed: a signed 64-bit integer; no two give the same stream. None: a new one from the engine's seed.
    stop: strings that end the output and are cut from it; a lone string is one of them. Found only where they end
        behind the first min_tokens tokens.
    stop_token_ids: tokens that end the output.
    include_stop_str_in_output: keep the stop string, or the text of the stop token, in the output.
    max_tokens: output tokens at most; None goes to the model's limit.
    min_tokens: output tokens before which only max_tokens ends the output.
    ignore_eos: go on past the model's own end token.
    logprobs: None for none, k for the chosen token's and the k most likely ones'.
    prompt_logprobs: the same for each token of the prompt but the first.
    logit_bias: token id -> what is added to its logit, in [-100, 100].
    bad_words: strings, or lists of token ids, that the output never contains: their last token is not chosen.
    allowed_token_ids: the only tokens that may be chosen; None for all.
    logits_processors: functions of (output token ids, logits) or (prompt token ids, output token ids, logits) that
        return the logits to use, [vocab_size] float32. They run one by one in Python, and no step is launched ahead.
        One that raises ends its request with finish_reason "error". Refused with tensor parallelism.
    structured_outputs: what the output must look like, a StructuredOutputsParams or a mapping of its fields. The output
        ends where it is complete, at an end token: not with ignore_eos or min_tokens.
    detokenize: False for token ids without text.
    skip_special_tokens: leave special tokens out of the text.
    spaces_between_special_tokens: keep the spaces that some tokenizers put between special tokens.
    cache_salt: cached tokens are shared among requests of one salt only, as those of one user.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    prompt_logprobs: int | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    allowed_token_ids: Sequence[int] | None = None
    logits_processors: Sequence[Callable[..., Any]] = ()
    structured_outputs: StructuredOutputsParams | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        self._normalize()
        self._check_counts()
        self._check_distribution()
        self._check_penalties()
        self._check_stops()
        self._check_tokens()
        self._check_switches()
        self._check_structure()
        _ = self.is_plain, self.needs_host_tokens  # cached from here on: each step asks them of each request

    @cached_property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature < _LEAST_TEMPERATURE

    @cached_property
    def is_plain(self) -> bool:
        """Whether every token is the likeliest of the model's own logits, and nothing more is asked of any."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        changed = penalised or self.logit_bias or self.min_tokens or self.logits_processors
        limited = self.bad_words or self.allowed_token_ids is not None or self.structured_outputs is not None
        told = self.logprobs is not None or self.prompt_logprobs is not None
        return self.is_greedy and not changed and not limited and not told

    @cached_property
    def needs_host_tokens(self) -> bool:
        """Whether sampling needs the values of all earlier tokens in Python, not just on the device."""
        return bool(self.bad_words or self.logits_processors)

    def _normalize(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _entries("stop", self.stop, "strings")
        object.__setattr__(self, "stop", stop)
        for name, kind in _LISTS.items():
            object.__setattr__(self, name, _entries(name, getattr(self, name), kind))
        if self.allowed_token_ids is not None:
            allowed = _entries("allowed_token_ids", self.allowed_token_ids, "token ids")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _integer_keys(self.logit_bias))
        object.__setattr__(self, "structured_outputs", StructuredOutputsParams.of(self.structured_outputs))

    def _check_counts(self) -> None:
        _check_int("n", self.n, 1, _MOST_COMPLETIONS)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens is {self.min_tokens}: it must not exceed max_tokens, {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0)
        if self.seed is not None:
            _check_int("seed", self.seed, _INT64[0])
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise ValueError(f"cache_salt is {short_repr(self.cache_salt)}: it must be a string that is not empty")

    def _check_distribution(self) -> None:
        _check_float("temperature", self.temperature, 0.0, _FLOAT32_MAX)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p is 0: it must lie in (0, 1]")
        _check_int("top_k", self.top_k, -1)
        _check_float("min_p", self.min_p, 0.0, 1.0)

    def _check_penalties(self) -> None:
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 1e-10, 1e10)  # logits stay within float32
        for token_id, bias in (self.logit_bias or {}).items():
            _check_float(f"logit_bias[{short_repr(token_id)}]", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop holds {short_repr(text)}: each entry must be a string of one character or more")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop is {short_repr(self.stop)}: stop strings need detokenize=True")
        for token_id in self.stop_token_ids:
            _check_int("an entry of stop_token_ids", token_id, 0)

    def _check_tokens(self) -> None:
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: it must hold a token id, or be None for all tokens")
        for token_id in self.allowed_token_ids or ():
            _check_int("an entry of allowed_token_ids", token_id, 0)
        for word in self.bad_words:
            if not word or not isinstance(word, (str, list, tuple)):
                raise ValueError(f"bad_words holds {short_repr(word)}: each entry must be text or a list of token ids")
            for token_id in () if isinstance(word, str) else word:
                _check_int("a token id of bad_words", token_id, 0)
        for processor in self.logits_processors:
            if not callable(processor):
                raise ValueError(f"logits_processors holds {short_repr(processor)}: each entry must be a function")

    def _check_switches(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {short_repr(getattr(self, name))}: it must be true or false")

    def _check_structure(self) -> None:
        if self.structured_outputs is None:
            return
        for name, off in (("ignore_eos", False), ("min_tokens", 0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: it must be {off} with structured_outputs, which says where the "
                    "output ends"
                )


def _entries(name: str, value: object, kind: str) -> tuple[object, ...]:
    """None stands for none of them."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is {short_repr(value)}: it must be a list of {kind}")
    return tuple(value)


def _integer_keys(bias: Mapping[int, float]) -> dict[int, float]:
    """JSON has only string keys: accept "17" for 17."""
    try:
        return {int(key) if isinstance(key, str) else operator.index(key): value for key, value in bias.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"logit_bias is {short_repr(bias)}: it must map token ids (integers) to numbers") from None


def _check_int(name: str, value: object, low: int, high: int = _INT64[1]) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {short_repr(value)}: it must be an integer")
    if value < low:
        raise ValueError(f"{name} is {short_repr(value)}: it must be at least {low}")
    if value > high:
        raise ValueError(f"{name} is {short_repr(value)}: it must be at most {high}")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf
    ):  # NaN is neither; isfinite() raises for 10**400
        raise ValueError(f"{name} is {short_repr(value)}: it must be a finite number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {short_repr(value)}: it must be in [{low:g}, {high:g}]")
