"""Which tokens of a prompt leave in which step."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk, NewRequest, Portion


@dataclass
class _Progress:
    """Of one prompt, in tokens. num_sent: those in portions so far, of which there are `count`."""

    length: int
    num_sent: int = 0
    count: int = 0


class Portions:
    """Divides prompts into portions that end where chunks end: few, so that ranges are long, and early ones, so that
    little is left when the last token is computed."""

    def __init__(self, backend: str, num_layers: int, max_ranges: int) -> None:
        """max_ranges: of a request. A portion is 2 ranges where a region holds all layers, else 2 a layer; on blocks, 2
        a layer and block, however it is divided: there every chunk is a portion."""
        spec = BackendSpec.parse(backend)
        each = 2 if spec.megacache else 2 * num_layers
        self._most = None if spec.is_paged else max(1, max_ranges // each)
        self._progress: dict[str, _Progress] = {}
        self._planned: dict[int, tuple[Portion, ...]] = {}  # by step, of those that have not ended

    def add(self, new: NewRequest, first: int = 0) -> None:
        """A prompt that is to be sent, from this token on."""
        self._progress[new.request_id] = _Progress(len(new.token_ids), first)

    def plan(self, step_id: int, chunks: Iterable[Chunk]) -> tuple[Portion, ...]:
        """What is to leave in a step of these chunks. Prompts that are not known are not sent."""
        self._planned[step_id] = portions = tuple(self._due(chunks))
        return portions

    def complete(self, step_id: int) -> None:
        """The step has run: its portions leave."""
        self._planned.pop(step_id, None)

    def take_back(self, step_id: int) -> None:
        """The step has not run, and neither will those planned after it: their portions are planned again."""
        if step_id in self._planned:  # else it was taken back with one before it
            for portions in reversed(self._planned.values()):
                self._undo(portions)
            self._planned.clear()

    def finish(self, request_id: str) -> int | None:
        """How many portions were sent of a prompt; None where it is not known (any more)."""
        progress = self._progress.pop(request_id, None)
        return None if progress is None else progress.count

    def _due(self, chunks: Iterable[Chunk]) -> Iterator[Portion]:
        for chunk in chunks:
            progress = self._progress.get(chunk.request_id)
            end = chunk.start + chunk.num_tokens
            if progress is not None and self._is_due(progress, end):
                yield Portion(chunk.request_id, progress.num_sent, end)
                progress.num_sent = end
                progress.count += 1

    def _undo(self, portions: Iterable[Portion]) -> None:
        for portion in portions:
            progress = self._progress.get(portion.request_id)
            if progress is not None:
                progress.num_sent = portion.first
                progress.count -= 1

    def _is_due(self, progress: _Progress, end: int) -> bool:
        unsent = end - progress.num_sent
        if end == progress.length or self._most is None:
            return unsent > 0
        return unsent * self._most >= progress.length
