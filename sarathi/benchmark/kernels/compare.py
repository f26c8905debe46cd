"""Several kernels that do the same, each checked first, then measured in turn. Knows no kernel."""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from sarathi.benchmark.kernels.timing import Sample, graph_sample, in_turn_us
from sarathi.benchmark.records import Attempts

Launch = Callable[[int], Tensor]  # number of the copy of the inputs -> result
_ALL = slice(None)


def compare_us(
    attempts: Attempts,
    launches: Iterable[tuple[str, Callable[[], Launch]]],
    expected: Tensor,
    sample: Callable[[Launch], Sample],
    *,
    checked: Tensor | slice = _ALL,
    rounds: int = 7,
) -> dict[str, float]:
    """Microseconds by name. One that fails, or whose rows `checked` are not as expected, is reported and left out."""
    ready = {name: attempts.run(name, partial(_ready, make, expected, checked, sample)) for name, make in launches}
    return in_turn_us({name: each for name, each in ready.items() if each is not None}, rounds)


def over_copies(copies: int) -> Callable[[Launch], Sample]:
    """Samples of graphs that walk over so many copies of the inputs."""
    return lambda launch: graph_sample(launch, copies)


def _ready(
    make: Callable[[], Launch], expected: Tensor, checked: Tensor | slice, sample: Callable[[Launch], Sample]
) -> Sample:
    launch = make()
    error = ((launch(0)[checked].double() - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise ValueError(f"wrong result, error {error:.1e}")
    return sample(launch)
