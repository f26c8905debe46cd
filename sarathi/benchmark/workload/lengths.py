"""Prompt and output lengths: of a run, by its configuration, and of the works that engines are compared on.

Each provider of a run takes its section, a count and a generator of random numbers, and gives that many requests.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from sarathi.benchmark.config.schema import (
    BenchmarkConfig,
    FixedRequestLengthGeneratorConfig,
    TraceRequestLengthGeneratorConfig,
    UniformRequestLengthGeneratorConfig,
    ZipfRequestLengthGeneratorConfig,
)
from sarathi.benchmark.workload.csv_traces import read_length_csv
from sarathi.benchmark.workload.json_lines import read_json_lines
from sarathi.benchmark.workload.shapes import SHAPES, TraceShape
from sarathi.benchmark.workload.sharing import MultiTurn, PrefixRepetition
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.benchmark.workload.text_files import format_of
from sarathi.benchmark.workload.texts import CountTokens, read_sharegpt, read_sonnet

MOST_DRAWN_FOR_ONE = 1024  # requests of a shape for one that is kept
NUM_SONNETS = 1000  # of the endless prompts of a poem
Requests = list[tuple[int, int]]  # prompt tokens, output tokens
logger = logging.getLogger(__name__)


def make_lengths(
    config: BenchmarkConfig, count: int, rng: np.random.Generator, count_tokens: CountTokens | None = None
) -> list[RequestSpec]:
    """`count` requests that all arrive at time zero, by the configured provider.

    count_tokens: tokens of a text, for data sets of text; ValueError where it is needed and None.
    """
    provider = config.synthetic_request_generator.length_provider
    if provider == "trace":
        section = config.trace_request_length_generator
        shape = SHAPES.get(section.trace_file.lower())
        if shape is not None:
            return shape_lengths(shape, section, count, rng)
        return file_lengths(section, count, config.seed, count_tokens)
    if provider == "uniform":
        return uniform_lengths(config.uniform_request_length_generator, count, rng)
    if provider == "zipf":
        return zipf_lengths(config.zipf_request_length_generator, count, rng)
    if provider == "prefix_repetition":
        return PrefixRepetition(**vars(config.prefix_repetition_request_length_generator)).requests(count, rng)
    if provider == "multi_turn":
        turns = config.multi_turn_request_length_generator
        lengths = turns.num_turns, turns.shared_len, turns.user_len, turns.output_len
        return MultiTurn(*lengths, turns.think_time).requests(count)
    return fixed_lengths(config.fixed_request_length_generator, count)


def fixed_lengths(config: FixedRequestLengthGeneratorConfig, count: int) -> list[RequestSpec]:
    """The same lengths for all."""
    return [RequestSpec(0.0, config.prefill_tokens, config.decode_tokens)] * count


def uniform_lengths(
    config: UniformRequestLengthGeneratorConfig, count: int, rng: np.random.Generator
) -> list[RequestSpec]:
    """Totals drawn evenly from [min_tokens, max_tokens]."""
    _check_range("uniform_request_length_generator", config.min_tokens, config.max_tokens)
    totals = rng.integers(config.min_tokens, config.max_tokens, count, endpoint=True)
    return [_split(int(total), config.prefill_to_decode_ratio) for total in totals]


def zipf_lengths(config: ZipfRequestLengthGeneratorConfig, count: int, rng: np.random.Generator) -> list[RequestSpec]:
    """Totals from [min_tokens, max_tokens], the n-th of them with probability ~ 1 / n^theta; scramble reorders them."""
    _check_range("zipf_request_length_generator", config.min_tokens, config.max_tokens)
    totals = np.arange(config.min_tokens, config.max_tokens + 1)
    if config.scramble:
        rng.shuffle(totals)
    weights = np.arange(1, len(totals) + 1, dtype=float) ** -config.theta
    drawn = rng.choice(totals, count, p=weights / weights.sum())
    return [_split(int(total), config.prefill_to_decode_ratio) for total in drawn]


def file_lengths(
    config: TraceRequestLengthGeneratorConfig, count: int, seed: int, count_tokens: CountTokens | None = None
) -> list[RequestSpec]:
    """Lengths of a file, scaled, cut to max_tokens, without those below min_tokens, in the original's order.

    That is the order of pandas' `sample(frac=1, random_state=seed)`. Where more requests are asked for than there are,
    they begin again; ValueError where there is none.
    """
    found = read_lengths(config.trace_file, count_tokens, seed)
    _tell_cut(found, config)
    kept = _kept(found, config)
    if not kept:
        raise ValueError(_too_few(config, len(found), 0, count))
    if len(kept) < len(found):
        few = "%d of %d requests have prompts of no more than min_tokens, %d, and are left out"
        logger.warning(few, len(found) - len(kept), len(found), config.least_tokens)
    if len(kept) < count:
        logger.warning("%r has %d requests: the %d asked for repeat them", config.trace_file, len(kept), count)
    order = np.random.RandomState(seed % 2**32).permutation(len(kept))
    return [kept[order[number % len(kept)]] for number in range(count)]


def shape_lengths(
    shape: TraceShape, config: TraceRequestLengthGeneratorConfig, count: int, rng: np.random.Generator
) -> list[RequestSpec]:
    """Lengths of a shipped shape, scaled, cut and kept as those of a file. ValueError where hardly any is kept."""
    kept = _draw(shape, config, count, rng)
    if len(kept) < count:
        raise ValueError(_too_few(config, None, len(kept), count))
    return [kept[index] for index in rng.permutation(len(kept))[:count]]


def _too_few(config: TraceRequestLengthGeneratorConfig, found: int | None, kept: int, count: int) -> str:
    of_all = "" if found is None else f" of {found}"
    return (
        f"trace_request_length_generator: {config.trace_file!r} has {kept}{of_all} requests of more than min_tokens, "
        f"{config.least_tokens} prompt tokens, and {count} are asked for"
    )


def _draw(
    shape: TraceShape, config: TraceRequestLengthGeneratorConfig, count: int, rng: np.random.Generator
) -> list[RequestSpec]:
    """At least `count` requests of a shape that are kept, or fewer where hardly any would be.

    A draw that leaves too few is followed by one of twice the size in its place: each has the shape by itself.
    """
    kept: list[RequestSpec] = []
    size = count
    while len(kept) < count and size <= MOST_DRAWN_FOR_ONE * count:
        pairs = zip(*shape.sample(size, rng), strict=True)
        kept = _kept([RequestSpec(0.0, int(prompt), int(output)) for prompt, output in pairs], config)
        size *= 2
    return kept


def _kept(found: Sequence[RequestSpec], config: TraceRequestLengthGeneratorConfig) -> list[RequestSpec]:
    scaled = [_scale(spec, config) for spec in found]
    return [spec for spec in scaled if spec.num_prefill_tokens > config.least_tokens]


def _tell_cut(found: Sequence[RequestSpec], config: TraceRequestLengthGeneratorConfig) -> None:
    num_cut = sum(spec.text is None and sum(_scaled(spec, config)) > config.max_tokens for spec in found)
    if num_cut:
        logger.warning("%d of %d requests are cut to max_tokens %d", num_cut, len(found), config.max_tokens)


def _scale(spec: RequestSpec, config: TraceRequestLengthGeneratorConfig) -> RequestSpec:
    """A text stays whole: only lengths that stand for themselves can be scaled and cut."""
    prompt, output = _scaled(spec, config)
    if spec.text is not None and prompt != spec.num_prefill_tokens:
        raise ValueError(
            f"prefill_scale_factor is {config.prefill_scale_factor}: prompts of text can only be taken whole"
        )
    if spec.text is None:
        prompt, output = cut_to_fit(prompt, output, config.max_tokens)
    return replace(spec, num_prefill_tokens=max(prompt, 1), num_decode_tokens=max(output, 1))


def _scaled(spec: RequestSpec, config: TraceRequestLengthGeneratorConfig) -> tuple[int, int]:
    prompt, output = spec.num_prefill_tokens, spec.num_decode_tokens
    return int(prompt * config.prefill_scale_factor), int(output * config.decode_scale_factor)


def cut_to_fit(prompt: int, output: int, limit: int) -> tuple[int, int]:
    """Lengths of at most `limit` tokens together, cut in proportion, both at least 1.

    Each part of the excess is rounded up, and computed in floats as the original does, so that lengths are the same;
    the sum may be one below the limit, never above it.
    """
    total = prompt + output
    excess = max(total - limit, 0)
    if not excess:
        return prompt, output
    kept = max(prompt - math.ceil(excess * (prompt / total)), 1), max(output - math.ceil(excess * (output / total)), 1)
    return (kept[0], min(kept[1], limit - kept[0])) if kept[0] < limit else (limit - 1, 1)


def _split(total: int, ratio: float) -> RequestSpec:
    """A total as prompt and output of that ratio, both at least 1."""
    output = min(max(int(np.ceil(total / (1 + ratio))), 1), total - 1)
    return RequestSpec(0.0, total - output, output)


def _check_range(section: str, low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"{section}.min_tokens is {low}: it must not exceed max_tokens, {high}")


def read_lengths(name: str, count_tokens: CountTokens | None = None, seed: int = 0) -> list[RequestSpec]:
    """Requests of a file, all at time zero: CSV, Mooncake or Bailian .jsonl, ShareGPT .json, a poem's .txt.

    seed: draws the lines of a poem. ValueError names the file, and the row where one is wrong.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is no file and no shipped shape; shapes are {', '.join(SHAPES)}")
    kind = format_of(path)
    if kind == ".jsonl":
        return [replace(row, arrived_at_s=0.0) for row in read_json_lines(path)]
    if kind == ".json":
        return list(read_sharegpt(path, count_tokens))
    if kind == ".txt":
        return list(islice(read_sonnet(path, count_tokens, np.random.default_rng(seed)), NUM_SONNETS))
    return read_length_csv(path)


def uniform_requests(count: int, low: int, high: int, seed: int) -> Requests:
    """Prompts and outputs uniform between the limits."""
    source = random.Random(seed)
    return [(source.randint(low, high), source.randint(low, high)) for _ in range(count)]


def lognormal_requests(count: int, seed: int, longest: int) -> Requests:
    """Lengths like those of chats: a median prompt of 230 tokens and a median output of 190, with long tails."""
    source = random.Random(seed)

    def draw(median: float, sigma: float, high: int) -> int:
        drawn = round(source.lognormvariate(math.log(median), sigma))
        return min(max(4, drawn), high, longest // 2)

    return [(draw(230, 1.1, 4096), draw(190, 0.9, 2048)) for _ in range(count)]


def chat_lengths(count: int, seed: int) -> list[int]:
    """Tokens of requests like those of lognormal_requests, each somewhere in its output."""
    source = random.Random(seed)
    return [prompt + 1 + source.randrange(output) for prompt, output in lognormal_requests(count, seed, 2**17)]


def trace_requests(count: int, tokens: int, ratio: int) -> Requests:
    """Equal requests of `tokens` tokens, prompt : output as ratio : 1."""
    output = max(1, round(tokens / (ratio + 1)))
    return [(tokens - output, output)] * count
