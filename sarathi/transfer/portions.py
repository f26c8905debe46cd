"""Decides which tokens of a prompt are sent in which step."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk, NewRequest, Portion


@dataclass
class _Progress:
    """One prompt of `length` tokens, of which num_sent tokens are in num_portions portions so far."""

    length: int
    num_sent: int = 0
    num_portions: int = 0


class Portions:
    """Divides prompts into portions that end at chunk boundaries: few, for long ranges, and early ones, to leave little
    to send when the last token is computed."""

    def __init__(self, backend: str, num_layers: int, max_ranges: int) -> None:
        """max_ranges: of a request. A portion has 2 ranges if one region holds all layers, else 2 ranges per layer. A
        paged cache needs 2 ranges per layer and block however a prompt is divided: there every chunk is a portion."""
        spec = BackendSpec.parse(backend)
        ranges_per_portion = 2 if spec.megacache else 2 * num_layers
        self._max_portions = None if spec.is_paged else max(1, max_ranges // ranges_per_portion)
        self._progress: dict[str, _Progress] = {}
        self._planned: dict[int, tuple[Portion, ...]] = {}  # by id of the step in flight

    def add(self, new: NewRequest, first: int = 0) -> None:
        """Add a prompt that is to be sent from token `first` on."""
        self._progress[new.request_id] = _Progress(len(new.token_ids), first)

    def plan(self, step_id: int, chunks: Iterable[Chunk]) -> tuple[Portion, ...]:
        """The portions to send in a step with these chunks. Prompts that were not added are not sent."""
        self._planned[step_id] = portions = tuple(self._due(chunks))
        return portions

    def complete(self, step_id: int) -> None:
        """The step has run, so its portions are sent."""
        self._planned.pop(step_id, None)

    def roll_back(self, step_id: int) -> None:
        """The step has not run, and steps planned after it will not: plan their portions again."""
        if step_id in self._planned:  # else it was rolled back with an earlier step
            for portions in reversed(self._planned.values()):
                self._undo(portions)
            self._planned.clear()

    def finish(self, request_id: str) -> int | None:
        """The number of portions sent of a prompt; None for an unknown prompt."""
        progress = self._progress.pop(request_id, None)
        return None if progress is None else progress.num_portions

    def _due(self, chunks: Iterable[Chunk]) -> Iterator[Portion]:
        for chunk in chunks:
            progress = self._progress.get(chunk.request_id)
            end = chunk.start + chunk.num_tokens
            if progress is not None and self._is_due(progress, end):
                yield Portion(chunk.request_id, progress.num_sent, end)
                progress.num_sent = end
                progress.num_portions += 1

    def _undo(self, portions: Iterable[Portion]) -> None:
        for portion in portions:
            progress = self._progress.get(portion.request_id)
            if progress is not None:
                progress.num_sent = portion.first
                progress.num_portions -= 1

    def _is_due(self, progress: _Progress, end: int) -> bool:
        unsent = end - progress.num_sent
        if end == progress.length or self._max_portions is None:
            return unsent > 0
        return unsent * self._max_portions >= progress.length
