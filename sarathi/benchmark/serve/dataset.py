"""Requests to send, and when, from the options.

With the server's tokenizer, prompts are text of exactly as many tokens as are asked for. Without it, those of
completions are token ids, of an exact length too, and chat messages are words, about one token each. Results report the
server's own count where it gives one, which for chat has the tokens of the template.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from sarathi.benchmark.serve.client import OutgoingRequest
from sarathi.benchmark.serve.vocabulary import Vocabulary
from sarathi.benchmark.workload.csv_traces import has_times, read_length_csv, read_timed_csv
from sarathi.benchmark.workload.intervals import gamma_arrivals
from sarathi.benchmark.workload.json_lines import read_json_lines
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.benchmark.workload.texts import CountTokens, SonnetLengths, read_sharegpt, read_sonnet

SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "te", "vo")
CHARACTERS_A_TOKEN = 4  # where only text is known, and no tokenizer; the server's count replaces it
MAX_CHAT_PROMPT_TOKENS, MAX_CHAT_TOKENS = 1024, 2048  # of ShareGPT's, as vLLM's benchmark takes them


def make_requests(args: argparse.Namespace, vocabulary: Vocabulary | None = None) -> list[OutgoingRequest]:
    """`--num-prompts` requests; the same options give the same ones. vocabulary: of --tokenizer, where one is given."""
    specs = _specs(args, vocabulary)
    times = _times(args, specs)
    prompts = PromptMaker(args.seed, len(vocabulary.words) if vocabulary else args.vocab_size)
    prefix = (
        prompts.token_ids(RequestSpec(0.0, args.random_prefix_len, 1), len(specs)) if args.random_prefix_len else []
    )
    requests = []
    for number, (spec, at_s) in enumerate(zip(specs, times, strict=True)):
        ids = prefix + prompts.token_ids(spec, number) if spec.text is None else []
        prompt = spec.text if spec.text is not None else _prompt(ids, args.backend, vocabulary)
        requests.append(OutgoingRequest(at_s, prompt, len(ids) or spec.num_prefill_tokens, spec.num_decode_tokens))
    return requests


def words(ids: list[int]) -> str:
    """A word an id: short ones that tokenizers seldom split further."""
    return " ".join(SYLLABLES[token % len(SYLLABLES)] for token in ids)


def _prompt(ids: list[int], backend: str, vocabulary: Vocabulary | None) -> str | list[int]:
    """Text of completions has room for the tokens that the server adds to it; those of a chat template come on top."""
    if vocabulary is None:
        return words(ids) if backend == "openai-chat" else ids
    num_added = 0 if backend == "openai-chat" else vocabulary.num_special_tokens
    return vocabulary.text(ids[: max(len(ids) - num_added, 1)])


def _specs(args: argparse.Namespace, vocabulary: Vocabulary | None) -> list[RequestSpec]:
    if args.dataset_name == "random":
        return _random_specs(args)
    if args.dataset_path is None:
        raise ValueError(f"--dataset-name {args.dataset_name} needs --dataset-path")
    path = Path(args.dataset_path)
    specs = list(islice(_read(args, path, vocabulary), args.num_prompts))
    if len(specs) < args.num_prompts:
        raise ValueError(f"--num-prompts is {args.num_prompts}, but {str(path)!r} has {len(specs)} requests")
    return specs


def _read(args: argparse.Namespace, path: Path, vocabulary: Vocabulary | None) -> Iterable[RequestSpec]:
    count_tokens = vocabulary.count if vocabulary else _estimate
    if args.dataset_name == "sharegpt":
        return _chats(args, path, count_tokens)
    if args.dataset_name == "sonnet":
        lengths = SonnetLengths(args.sonnet_input_len, args.sonnet_output_len, args.sonnet_prefix_len)
        return read_sonnet(path, count_tokens, np.random.default_rng([args.seed, 0]), lengths)
    if args.dataset_name == "mooncake":
        return read_json_lines(path)
    return read_timed_csv(path) if has_times(path) else read_length_csv(path)


def _chats(args: argparse.Namespace, path: Path, count_tokens: CountTokens) -> Iterator[RequestSpec]:
    """Conversations in an order that the seed draws, without the long ones."""
    rng = None if args.disable_shuffle else np.random.default_rng([args.seed, 2])
    for spec in read_sharegpt(path, count_tokens, rng):
        chat = replace(spec, num_decode_tokens=args.sharegpt_output_len or spec.num_decode_tokens)
        if chat.num_prefill_tokens <= MAX_CHAT_PROMPT_TOKENS and chat.num_tokens <= MAX_CHAT_TOKENS:
            yield chat


def _estimate(text: str) -> int:
    return -(-len(text) // CHARACTERS_A_TOKEN)


def _random_specs(args: argparse.Namespace) -> list[RequestSpec]:
    spread = args.random_range_ratio
    if not 0 <= spread < 1:
        raise ValueError(f"--random-range-ratio is {spread}: it must be at least 0 and less than 1")
    rng = np.random.default_rng([args.seed, 0])
    means = (args.random_input_len, args.random_output_len)
    draws = [
        rng.integers(
            max(math.floor(mean * (1 - spread)), 1), math.ceil(mean * (1 + spread)), args.num_prompts, endpoint=True
        )
        for mean in means
    ]
    return [RequestSpec(0.0, int(prompt), int(output)) for prompt, output in zip(*draws, strict=True)]


def _times(args: argparse.Namespace, specs: list[RequestSpec]) -> list[float]:
    if args.request_rate < math.inf:
        rng = np.random.default_rng([args.seed, 1])
        times: list[float] = gamma_arrivals(args.request_rate, args.burstiness**-0.5, len(specs), rng).tolist()
        return times
    origin_s = min(spec.arrived_at_s for spec in specs)
    return [spec.arrived_at_s - origin_s for spec in specs]
