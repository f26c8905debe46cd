"""Prompt and output lengths of a synthetic workload. Knows no arrival times and no prompts.

Each provider takes its section, a count and a generator of random numbers, and gives that many requests' lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sarathi.benchmark.config.schema import (
    BenchmarkConfig,
    FixedRequestLengthGeneratorConfig,
    TraceRequestLengthGeneratorConfig,
    UniformRequestLengthGeneratorConfig,
    ZipfRequestLengthGeneratorConfig,
)
from sarathi.benchmark.workload.datasets import CountTokens, read_lengths
from sarathi.benchmark.workload.shapes import SHAPES, TraceShape
from sarathi.benchmark.workload.spec import RequestSpec

MOST_DRAWN_FOR_ONE = 1024  # requests of a shape for one that is kept


def make_lengths(
    config: BenchmarkConfig, count: int, rng: np.random.Generator, count_tokens: CountTokens | None = None
) -> list[RequestSpec]:
    """`count` requests that all arrive at time zero, by the configured provider.

    count_tokens: tokens of a text, for data sets of text; ValueError where it is needed and None.
    """
    provider = config.synthetic_request_generator.length_provider
    if provider == "trace":
        return trace_lengths(config.trace_request_length_generator, count, rng, count_tokens)
    if provider == "uniform":
        return uniform_lengths(config.uniform_request_length_generator, count, rng)
    if provider == "zipf":
        return zipf_lengths(config.zipf_request_length_generator, count, rng)
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


def trace_lengths(
    config: TraceRequestLengthGeneratorConfig,
    count: int,
    rng: np.random.Generator,
    count_tokens: CountTokens | None = None,
) -> list[RequestSpec]:
    """Lengths of a file, shuffled, or of a shipped shape; scaled, cut to max_tokens, without those below min_tokens.

    ValueError where fewer requests than `count` are left.
    """
    shape = SHAPES.get(config.trace_file.lower())
    if shape is None:
        kept = _kept(read_lengths(config.trace_file, count_tokens), config)
    else:
        kept = _draw(shape, config, count, rng)
    if len(kept) < count:
        raise ValueError(
            f"trace_request_length_generator: {config.trace_file!r} has {len(kept)} requests of more than "
            f"{config.min_tokens} prompt tokens, and {count} are asked for"
        )
    return [kept[index] for index in rng.permutation(len(kept))[:count]]


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
    return [spec for spec in scaled if spec.num_prefill_tokens > config.min_tokens]


def _scale(spec: RequestSpec, config: TraceRequestLengthGeneratorConfig) -> RequestSpec:
    """A text stays whole: only lengths that stand for themselves can be scaled and cut."""
    prompt = int(spec.num_prefill_tokens * config.prefill_scale_factor)
    output = int(spec.num_decode_tokens * config.decode_scale_factor)
    if spec.text is not None and prompt != spec.num_prefill_tokens:
        raise ValueError(
            f"prefill_scale_factor is {config.prefill_scale_factor}: prompts of text can only be taken whole"
        )
    excess = max(prompt + output - config.max_tokens, 0)
    if excess and spec.text is None:
        prompt = max(prompt - -(-excess * prompt // (prompt + output)), 1)
        output = config.max_tokens - prompt
    return replace(spec, num_prefill_tokens=max(prompt, 1), num_decode_tokens=max(output, 1))


def _split(total: int, ratio: float) -> RequestSpec:
    """A total as prompt and output of that ratio, both at least 1."""
    output = min(max(int(np.ceil(total / (1 + ratio))), 1), total - 1)
    return RequestSpec(0.0, total - output, output)


def _check_range(section: str, low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"{section}.min_tokens is {low}: it must not exceed max_tokens, {high}")
