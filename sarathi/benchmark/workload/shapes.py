"""Length distributions fitted to published quantiles, instead of data sets that cannot be shipped.

The vAttention paper evaluates on prompts made of arXiv papers, whose lengths are published only as quantiles. Each
distribution here is an inverse CDF through exactly these quantiles; between two of them it rises as

    Q(u) = a + (b - a) * t**bend,     t = (u - u_a) / (u_b - u_a)

with one bend for the whole curve, chosen to match the published mean: a segment's mean is a + (b - a) / (bend + 1), so
the bend follows from a linear equation. Without a published mean, the bend is that of the arXiv prompts (or outputs).
Bounds that are not published are marked below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class QuantileCurve:
    """An inverse CDF with `values` at `levels` (ascending from 0 to 1), and a given mean or else a given bend."""

    levels: tuple[float, ...]
    values: tuple[float, ...]
    mean: float | None = None
    given_bend: float = 1.0

    @property
    def bend(self) -> float:
        if self.mean is None:
            return self.given_bend
        widths, values = np.diff(self.levels), np.array(self.values)
        low = float(np.sum(widths * values[:-1]))
        rise = float(np.sum(widths * np.diff(values)))
        return rise / (self.mean - low) - 1.0

    def __call__(self, u: Floats) -> Floats:
        """Values at levels u in [0, 1]."""
        levels, values = np.array(self.levels), np.array(self.values)
        at = np.clip(np.searchsorted(levels, u, side="right") - 1, 0, len(levels) - 2)
        share = (u - levels[at]) / (levels[at + 1] - levels[at])
        return np.asarray(values[at] + (values[at + 1] - values[at]) * share**self.bend, dtype=np.float64)


@dataclass(frozen=True)
class TraceShape:
    """Joint distribution of prompt and output lengths.

    correlation: of their normal scores: longer papers have longer answers. max_tokens: of prompt plus output; the
    output is shortened, so that the longest prompts are as published.
    """

    prompt: QuantileCurve
    output: QuantileCurve
    correlation: float
    max_tokens: int

    def sample(self, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """`count` prompt and output lengths in tokens, each at least 1.

        Levels are stratified, one in each 1/count of [0, 1]: small samples follow the distribution closely.
        """
        first, noise = rng.standard_normal((2, count))
        second = self.correlation * first + np.sqrt(1 - self.correlation**2) * noise
        levels = ((np.argsort(np.argsort(scores)) + rng.random(count)) / count for scores in (first, second))
        curves = (self.prompt, self.output)
        prompt, output = (np.rint(curve(u)).astype(np.int64) for curve, u in zip(curves, levels, strict=True))
        return prompt, np.minimum(output, self.max_tokens - prompt)


LEVELS = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_PROMPT = QuantileCurve(LEVELS, (4096, 4781, 7958, 18490, 26639, 31805), mean=10041)
_OUTPUT = QuantileCurve(LEVELS, (100, 180, 332, 653, 4053, 8192), mean=471)  # published: all but the two bounds


def _long(low: int, median: int, high: int, output_median: int, max_tokens: int) -> TraceShape:
    """The long traces are published as a range and medians; outputs are arXiv's, scaled to the median."""
    scale = output_median / _OUTPUT.values[LEVELS.index(0.5)]
    output = QuantileCurve(LEVELS, tuple(value * scale for value in _OUTPUT.values), given_bend=_OUTPUT.bend)
    prompt = QuantileCurve((0.0, 0.5, 1.0), (low, median, high), given_bend=_PROMPT.bend)
    return TraceShape(prompt, output, CORRELATION, max_tokens)


# Not published, but assumed: an answer to a longer paper tends to be longer. What is published does not tell, for the
# median ratio of prompt to output is near 28 with any value from 0 to 0.9. Give the real CSV where this matters.
CORRELATION = 0.7
SHAPES = {
    "arxiv": TraceShape(_PROMPT, _OUTPUT, CORRELATION, 32_768),
    "arxiv_long_online": _long(22 * 1024, 27_843, 46 * 1024, 318, 65_536),
    "arxiv_long_offline": _long(64 * 1024, 78_967, 193 * 1024, 345, 200_000),
}
