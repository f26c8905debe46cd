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

    def add(self, new: NewRequest) -> None:
        """A prompt that is to be sent."""
        self._progress[new.request_id] = _Progress(len(new.token_ids))

    def plan(self, chunks: Iterable[Chunk]) -> Iterator[Portion]:
        """What is to leave in a step of these chunks. Prompts that are not known are not sent."""
        for chunk in chunks:
            progress = self._progress.get(chunk.request_id)
            end = chunk.start + chunk.num_tokens
            if progress is not None and self._is_due(progress, end):
                yield Portion(chunk.request_id, progress.num_sent, end)
                progress.num_sent = end
                progress.count += 1

    def take_back(self, portions: Iterable[Portion]) -> None:
        """These belong to a step that did not run. Of several such steps, the newest first."""
        for portion in portions:
            progress = self._progress.get(portion.request_id)
            if progress is not None:
                progress.num_sent = portion.first
                progress.count -= 1

    def finish(self, request_id: str) -> int | None:
        """How many portions were sent of a prompt; None where it is not known (any more)."""
        progress = self._progress.pop(request_id, None)
        return None if progress is None else progress.count

    def _is_due(self, progress: _Progress, end: int) -> bool:
        unsent = end - progress.num_sent
        if end == progress.length or self._most is None:
            return unsent > 0
        return unsent * self._most >= progress.length
