"""Prompt and output lengths: of a run's configuration, and of the workloads for engine comparisons.

A provider takes its section, a count and a random generator, and returns that many requests.
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
    """`count` requests from the configured provider, all at time zero.

    count_tokens: number of tokens of a text. ValueError if the data set is text and it is None.
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
    """Equal lengths for all requests."""
    return [RequestSpec(0.0, config.prefill_tokens, config.decode_tokens)] * count


def uniform_lengths(
    config: UniformRequestLengthGeneratorConfig, count: int, rng: np.random.Generator
) -> list[RequestSpec]:
    """Total lengths uniform in [min_tokens, max_tokens]."""
    _check_range("uniform_request_length_generator", config.min_tokens, config.max_tokens)
    totals = rng.integers(config.min_tokens, config.max_tokens, count, endpoint=True)
    return [_split(int(total), config.prefill_to_decode_ratio) for total in totals]


def zipf_lengths(config: ZipfRequestLengthGeneratorConfig, count: int, rng: np.random.Generator) -> list[RequestSpec]:
    """Total lengths in [min_tokens, max_tokens]; the n-th has probability ~ 1 / n^theta. scramble: permute them."""
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
    """Lengths of a file, scaled, cut to max_tokens, without prompts up to min_tokens, in Sarathi-Serve's order.

    That is pandas' `sample(frac=1, random_state=seed)`. Repeats the requests if the file has fewer than `count`;
    ValueError if it has none.
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
    """Lengths of a shipped shape, scaled, cut and filtered like a file's. ValueError if the filter keeps too few."""
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
    """Draw at least `count` requests that pass the filter, or fewer if hardly any pass.

    Doubles the sample size and redraws while there are too few: each draw is stratified as a whole.
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
    """Scale and cut lengths. ValueError for text, which cannot be scaled."""
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
    """Cut both lengths in proportion to at most `limit` tokens together, each at least 1.

    Rounds each part of the excess up, in floats as Sarathi-Serve does, for equal lengths. The sum may be limit - 1.
    """
    total = prompt + output
    excess = max(total - limit, 0)
    if not excess:
        return prompt, output
    kept = max(prompt - math.ceil(excess * (prompt / total)), 1), max(output - math.ceil(excess * (output / total)), 1)
    return (kept[0], min(kept[1], limit - kept[0])) if kept[0] < limit else (limit - 1, 1)


def _split(total: int, ratio: float) -> RequestSpec:
    """Split a total into prompt and output by their ratio, each at least 1."""
    output = min(max(int(np.ceil(total / (1 + ratio))), 1), total - 1)
    return RequestSpec(0.0, total - output, output)


def _check_range(section: str, low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"{section}.min_tokens is {low}: it must not exceed max_tokens, {high}")


def read_lengths(name: str, count_tokens: CountTokens | None = None, seed: int = 0) -> list[RequestSpec]:
    """Requests of a file, all at time zero: CSV, Mooncake or Bailian .jsonl, ShareGPT .json, a poem's .txt.

    seed: for the choice of a poem's lines. ValueError names the file, and the invalid row.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a file nor a shipped shape; shapes are {', '.join(SHAPES)}")
    kind = format_of(path)
    if kind == ".jsonl":
        return [replace(row, arrived_at_s=0.0) for row in read_json_lines(path)]
    if kind == ".json":
        return list(read_sharegpt(path, count_tokens))
    if kind == ".txt":
        return list(islice(read_sonnet(path, count_tokens, np.random.default_rng(seed)), NUM_SONNETS))
    return read_length_csv(path)


def uniform_requests(count: int, low: int, high: int, seed: int) -> Requests:
    """Prompt and output lengths uniform in [low, high]."""
    source = random.Random(seed)
    return [(source.randint(low, high), source.randint(low, high)) for _ in range(count)]


def lognormal_requests(count: int, seed: int, longest: int) -> Requests:
    """Chat-like lengths: log-normal with a median prompt of 230 tokens and a median output of 190."""
    source = random.Random(seed)

    def draw(median: float, sigma: float, high: int) -> int:
        drawn = round(source.lognormvariate(math.log(median), sigma))
        return min(max(4, drawn), high, longest // 2)

    return [(draw(230, 1.1, 4096), draw(190, 0.9, 2048)) for _ in range(count)]


def chat_lengths(count: int, seed: int) -> list[int]:
    """Context lengths of requests as in lognormal_requests, each at a random point of its output."""
    source = random.Random(seed)
    return [prompt + 1 + source.randrange(output) for prompt, output in lognormal_requests(count, seed, 2**17)]


def trace_requests(count: int, tokens: int, ratio: int) -> Requests:
    """Equal requests of `tokens` tokens, prompt : output as ratio : 1."""
    output = max(1, round(tokens / (ratio + 1)))
    return [(tokens - output, output)] * count
