"""`sarathi demo`: a model answers prompts, then three kinds of KV cache run the same prompts."""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from sarathi.config.schema import EngineConfig
from sarathi.engine.outputs import CompletionOutput, RequestOutput
from sarathi.entrypoints.console import format_size, format_table
from sarathi.entrypoints.llm import LLM
from sarathi.entrypoints.options import config_from
from sarathi.sampling_params import SamplingParams

BACKENDS = ("sdpa_paged_16", "sdpa_vattn", "sdpa_vattn_megacache")
QUESTIONS = (
    "What is the capital of France?",
    "What is the largest ocean on Earth?",
    "Name three primary colors.",
    "Write a haiku about the sea.",
    "How do plants make food?",
    "What is virtual memory in a computer?",
    "Give me three tips for sleeping well.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Write a Python function that returns the larger of two numbers.",
    "Write a short email to my team. Our meeting has moved from Monday at 10 to Tuesday at 3 in the afternoon, "
    "in the same room, and everybody should bring one idea for the next project.",
    "Summarize in one sentence: A paging system divides memory into pieces of equal size. When a program asks for "
    "more, the system finds free pieces anywhere and makes them look like one contiguous range, so that no program "
    "needs to know where its memory really is.",
    "Tell me a story about a dragon who could not fly.",
)
ROUNDS = 3
_HEADER = ("backend", "tokens/s", "peak KV mapped", "tokens' own bytes", "wasted")
_PREFIX_HEADER = ("prompt", "first token", "tokens found in the cache")
_PROMPT_TOKENS, _OWN_TOKENS = 1500, 10
_TOLERANCE = 1.1
_CANDIDATES = 20  # log-probabilities per token: in bfloat16 more than two tokens may tie
_TIE_EPS = 64  # logits between 16 and 32 have an error of a few units in the last place


def run(args: argparse.Namespace) -> int:
    """Returns 0 if all backends, and each prompt alone, produced the same tokens except for ties; else 1."""
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, logprobs=_CANDIDATES)
    config = config_from(args)
    streamed, cache_bytes = _stream(config, params)
    memory_bytes = config.cache.memory_bytes or cache_bytes // len(BACKENDS)
    print(f"\nThe same {len(QUESTIONS)} prompts all at once, {args.max_tokens} tokens each:\n")
    with ExitStack() as stack:
        alike = {"memory_bytes": memory_bytes, "prefix_caching": False}  # prompts repeat in every round
        configs = [config_from(args, attention_backend=name, **alike) for name in BACKENDS]
        engines = [stack.enter_context(LLM.from_config(each)) for each in configs]
        rounds = [[measure(llm, args.max_tokens) for llm in engines] for _ in range(ROUNDS)]
    runs = [with_median_time(each) for each in zip(*rounds, strict=True)]
    print(format_table(_HEADER, [each.row() for each in runs]))
    print(f"\ntokens/s: the median of {ROUNDS} rounds, in each of which the three ran in turn")
    print("\n" + runs[-1].arithmetic())
    first, second = measure_prefix(config_from(args, prefix_caching=True))
    print(f"\nTwo prompts of {_PROMPT_TOKENS} tokens that differ in the last {_OWN_TOKENS}:\n")
    print(format_table(_PREFIX_HEADER, [first.row("first"), second.row("second")]))
    print(
        f"\nprefix reuse: the second one's first token comes {first.first_token_s / second.first_token_s:.0f}x sooner\n"
    )
    verdict = compare(streamed, runs)
    print(f"outputs identical: {verdict}")
    return 0 if verdict.passed else 1


def divergence(ours: CompletionOutput, theirs: CompletionOutput) -> float | None:
    """Difference of our log-probabilities of the first two tokens that differ, in nats; None if all are equal."""
    for token, other, likely in zip(ours.token_ids, theirs.token_ids, ours.logprobs or (), strict=False):
        if token != other:
            return likely[token].logprob - likely[other].logprob if other in likely else math.inf
    return None


class Verdict(NamedTuple):
    """Divergences of answers. tie_nats: largest difference at which rounding may select either token."""

    divergences: Sequence[float]
    tie_nats: float

    @property
    def passed(self) -> bool:
        return max(self.divergences, default=0.0) <= self.tie_nats

    def __str__(self) -> str:
        if not self.divergences:
            return "yes"
        apart = f"diverging {len(self.divergences)} times, between tokens up to {max(self.divergences):.3f} nats apart"
        return f"{'but for ties' if self.passed else 'no'}, {apart} (rounding: {self.tie_nats:.3f})"


@dataclass(frozen=True)
class Measured:
    """Measurements of one backend. own_bytes: K and V of all tokens in the cache at the end.

    pages_bytes: one page per tensor and request: the expected overhead of whole pages.
    """

    backend: str
    answers: Sequence[CompletionOutput]
    elapsed_s: float
    peak_bytes: int
    own_bytes: int
    pages_bytes: int
    dtype_eps: float

    def row(self) -> tuple[str, ...]:
        """Cells of the table."""
        rate = sum(each.num_tokens for each in self.answers) / self.elapsed_s
        sizes = (self.peak_bytes, self.own_bytes, self.peak_bytes - self.own_bytes)
        return (self.backend, f"{rate:.1f}", *map(format_size, sizes))

    @property
    def is_tight(self) -> bool:
        """Whether mapped memory is at most tokens plus one page per tensor and request, within 10 %."""
        return self.peak_bytes <= _TOLERANCE * (self.own_bytes + self.pages_bytes)

    def arithmetic(self) -> str:
        """The comparison of `is_tight` as text."""
        allowed = f"{format_size(self.own_bytes)} of tokens + {format_size(self.pages_bytes)}"
        sign = "<=" if self.is_tight else ">"
        return (
            f"{self.backend}: {format_size(self.peak_bytes)} mapped {sign} "
            f"{_TOLERANCE} x ({allowed} for one page per tensor per request)"
        )


def measure(llm: LLM, max_tokens: int) -> Measured:
    """Run all questions in one batch with answers of `max_tokens`, so all are in the cache at the end."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=_CANDIDATES)
    prompts = list(_prompts(llm))
    llm.generate([prompts[0]], SamplingParams(max_tokens=2), use_tqdm=False)  # first calls set up threads and buffers
    start_s = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed_s = time.monotonic() - start_s
    facts, capacity = llm.engine.core.facts, llm.engine.core.facts.capacity
    num_tensors = facts.token_bytes // capacity.token_bytes  # a paged block covers all layers
    return Measured(
        backend=facts.resolution.backend,
        answers=[output.outputs[0] for output in outputs],
        elapsed_s=elapsed_s,
        peak_bytes=llm.memory_stats().peak_mapped_bytes,
        own_bytes=sum(map(_cached_tokens, outputs)) * facts.token_bytes,
        pages_bytes=len(prompts) * num_tensors * capacity.page_bytes,
        dtype_eps=facts.resolution.dtype_eps,
    )


class FirstToken(NamedTuple):
    """Time to first token, and how many of the prompt's tokens were cached."""

    first_token_s: float
    num_cached_tokens: int

    def row(self, name: str) -> tuple[str, ...]:
        """Cells of the table."""
        return name, f"{1e3 * self.first_token_s:.0f} ms", str(self.num_cached_tokens)


def measure_prefix(config: EngineConfig) -> tuple[FirstToken, FirstToken]:
    """Measure two long prompts, one after the other, that differ only in their last tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=1)
    with LLM.from_config(config) as llm:
        questions = [token for prompt in _prompts(llm) for token in prompt]
        shared = (questions * _PROMPT_TOKENS)[: _PROMPT_TOKENS - _OWN_TOKENS]
        llm.generate([questions[:2]], params, use_tqdm=False)  # first calls set up threads and buffers
        first, second = (_first_token(llm, [*shared, *[own] * _OWN_TOKENS], params) for own in questions[1:3])
    return first, second


def _first_token(llm: LLM, prompt: list[int], params: SamplingParams) -> FirstToken:
    start_s = time.monotonic()
    [output] = llm.generate([prompt], params, use_tqdm=False)
    return FirstToken(time.monotonic() - start_s, output.num_cached_tokens)


def with_median_time(rounds: Sequence[Measured]) -> Measured:
    """The first round with the median time of all rounds."""
    return replace(rounds[0], elapsed_s=median(each.elapsed_s for each in rounds))


def compare(streamed: Sequence[CompletionOutput], runs: Sequence[Measured]) -> Verdict:
    """Compare the tokens of all backends with each other and with the answers to each prompt alone."""
    first = runs[0].answers
    pairs = [
        pair for others in (streamed, *(each.answers for each in runs[1:])) for pair in zip(first, others, strict=True)
    ]
    divergences = [divergence(each, other) for each, other in pairs]
    return Verdict([each for each in divergences if each is not None], _TIE_EPS * runs[0].dtype_eps)


def _stream(config: EngineConfig, params: SamplingParams) -> tuple[list[CompletionOutput], int]:
    """Answer each prompt alone and print it; returns the answers and the cache size of this engine in bytes."""
    with LLM.from_config(config) as llm:
        print(f"{config.model.model}, one prompt after another:")
        answers = [_show(llm, number, prompt, params) for number, prompt in enumerate(_prompts(llm))]
        return answers, llm.engine.core.facts.num_cache_tokens * llm.engine.core.facts.token_bytes


def _show(llm: LLM, number: int, prompt: list[int], params: SamplingParams) -> CompletionOutput:
    print(f"\n[{number + 1}/{len(QUESTIONS)}] {QUESTIONS[number]}\n", flush=True)
    for output in llm.stream(prompt, params):
        [answer] = output.outputs
        print(answer.delta, end="", flush=True)
    print(" ..." if answer.num_tokens == params.max_tokens else "")
    return answer


def _prompts(llm: LLM) -> Iterator[list[int]]:
    return (llm.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS)


def _cached_tokens(output: RequestOutput) -> int:
    """Tokens in the cache: the last output token is never an input, so it has no K and V."""
    return len(output.prompt_token_ids) + output.outputs[0].num_tokens - 1
