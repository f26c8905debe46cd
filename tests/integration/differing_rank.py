"""The process of a rank: rank 2 comes to hold another token than the rest."""

from itertools import count

from sarathi.executor.ranks import process, service
from sarathi.messages import SchedulerOutput
from sarathi.worker.worker import Worker


class DifferingWorker(Worker):
    """Changes the first token of a request in its fifth call."""

    _numbers = count()

    def prepare(self, out: SchedulerOutput) -> int | None:
        rows = super().prepare(out)
        if self._ranks.number == 2 and next(self._numbers) >= 5 and out.chunks:
            self._sequences[out.chunks[0].request_id].token_ids[0] ^= 1
        return rows


def main(*descriptors: int) -> None:
    """See sarathi.executor.ranks.process.main."""
    service.Worker = DifferingWorker  # type: ignore[misc]
    process.main(*descriptors)
