"""Make the requests and their send times from the options.

With the server's tokenizer, prompts are text of exactly the requested length. Without it, completions have token ids,
also of exact length, and chat messages are words of about one token each. Results report the server's token count if it
sends one; for chat it includes the template.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sarathi.benchmark.serve.client import OutgoingRequest
from sarathi.benchmark.serve.vocabulary import Vocabulary
from sarathi.benchmark.workload.csv_traces import has_times, read_length_csv, read_timed_csv
from sarathi.benchmark.workload.intervals import gamma_arrivals
from sarathi.benchmark.workload.json_lines import read_json_lines
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.benchmark.workload.sharing import (
    MultiTurn,
    PrefixRepetition,
    PrefixReuse,
    is_later_turn,
    repeated_tokens,
)
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.benchmark.workload.texts import CountTokens, SonnetLengths, read_sharegpt, read_sonnet

SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "sa", "te", "vo")
CHARACTERS_A_TOKEN = 4  # where only text is known, and no tokenizer; the server's count replaces it
MAX_CHAT_PROMPT_TOKENS, MAX_CHAT_TOKENS = 1024, 2048  # of ShareGPT's, as vLLM's benchmark takes them


class Planned(NamedTuple):
    """Requests, and the prompt tokens that they share."""

    requests: list[OutgoingRequest]
    reuse: PrefixReuse


NOTHING_PLANNED = Planned([], PrefixReuse())


def make_requests(args: argparse.Namespace, vocabulary: Vocabulary | None = None) -> Planned:
    """`--num-prompts` requests, deterministic given the options. vocabulary: of --tokenizer, if given."""
    specs = _specs(args, vocabulary)
    times = _times(args, specs)
    prompts = PromptMaker(args.seed, len(vocabulary.words) if vocabulary else args.vocab_size)
    requests = []
    for number, (spec, at_s) in enumerate(zip(specs, times, strict=True)):
        ids = prompts.token_ids(spec, number) if spec.text is None else []
        question = ids[-args.multi_turn_user_len :] if is_later_turn(specs, number) else ids
        prompt = spec.text if spec.text is not None else _prompt(question, args.backend, vocabulary)
        length = len(ids) or spec.num_prefill_tokens
        requests.append(OutgoingRequest(at_s, prompt, length, spec.num_decode_tokens, spec.conversation))
    return Planned(requests, repeated_tokens(specs))


def words(ids: list[int]) -> str:
    """One word per id, short enough that tokenizers rarely split it."""
    return " ".join(SYLLABLES[token % len(SYLLABLES)] for token in ids)


def _prompt(ids: list[int], backend: str, vocabulary: Vocabulary | None) -> str | list[int]:
    """Text of a completion is shortened by the special tokens that the server adds; a chat template's come on top."""
    if vocabulary is None:
        return words(ids) if backend == "openai-chat" else ids
    num_added = 0 if backend == "openai-chat" else vocabulary.num_special_tokens
    return vocabulary.text(ids[: max(len(ids) - num_added, 1)])


def _specs(args: argparse.Namespace, vocabulary: Vocabulary | None) -> list[RequestSpec]:
    if args.dataset_name == "random":
        return _random_specs(args)
    if args.dataset_name == "prefix_repetition":
        return _repetition(args).requests(args.num_prompts, np.random.default_rng([args.seed, 0]))
    if args.dataset_name == "multi_turn":
        return _conversations(args, vocabulary).requests(args.num_prompts)
    if args.dataset_path is None:
        raise ValueError(f"--dataset-name {args.dataset_name} needs --dataset-path")
    path = Path(args.dataset_path)
    specs = list(islice(_read(args, path, vocabulary), args.num_prompts))
    if len(specs) < args.num_prompts:
        raise ValueError(f"--num-prompts is {args.num_prompts}, but {str(path)!r} has {len(specs)} requests")
    return specs


def _repetition(args: argparse.Namespace) -> PrefixRepetition:
    return PrefixRepetition(
        args.prefix_repetition_num_prefixes, args.prefix_repetition_prefix_len, args.prefix_repetition_suffix_len,
        args.prefix_repetition_output_len,
    )  # fmt: skip


def _conversations(args: argparse.Namespace, vocabulary: Vocabulary | None) -> MultiTurn:
    if vocabulary is None and args.backend != "openai-chat":
        raise ValueError("--dataset-name multi_turn needs --tokenizer or --backend openai-chat: turns are text")
    return MultiTurn(
        args.multi_turn_num_turns, args.multi_turn_shared_len, args.multi_turn_user_len, args.multi_turn_output_len,
        args.multi_turn_think_time,
    )  # fmt: skip


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
    """Conversations shuffled by the seed, without the long ones."""
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
    shared = args.random_prefix_len
    blocks = (0,) if shared else ()
    return [
        RequestSpec(0.0, shared + int(prompt), int(output), None, blocks, max(shared, 1))
        for prompt, output in zip(*draws, strict=True)
    ]


def _times(args: argparse.Namespace, specs: list[RequestSpec]) -> list[float]:
    times = [spec.arrived_at_s for spec in specs]
    begins = [number for number in range(len(specs)) if not is_later_turn(specs, number)]
    origin_s = min(times[number] for number in begins)
    drawn = [times[number] - origin_s for number in begins]
    if args.request_rate < math.inf:
        rng = np.random.default_rng([args.seed, 1])
        drawn = gamma_arrivals(args.request_rate, args.burstiness**-0.5, len(begins), rng).tolist()
    for number, at_s in zip(begins, drawn, strict=True):
        times[number] = at_s
    return times
