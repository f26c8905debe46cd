"""The process of a rank, with steps in which rank 1 alone has too little memory, unless it computes for others."""

from itertools import count

from sarathi.executor.ranks import process, service
from sarathi.messages import SchedulerOutput
from sarathi.worker.worker import Worker

SHORT_STEPS = (3, 9, 10)


class ShortWorker(Worker):
    """Refuses some steps after it has mapped their memory. short_steps: of those that may be short, from 0."""

    short_steps = SHORT_STEPS
    _numbers = count()

    def may_be_short(self) -> bool:
        return self._ranks.number == 1 and self.sending is None

    def prepare(self, out: SchedulerOutput) -> int | None:
        rows = super().prepare(out)
        may_be_short = self.may_be_short() and bool(out.chunks)
        if not may_be_short or rows is not None or next(self._numbers) not in self.short_steps:
            return rows
        self.cancel(out)
        return self.capacity.rows - 1


def main(*descriptors: int, worker: type[Worker] = ShortWorker) -> None:
    """See sarathi.executor.ranks.process.main."""
    service.Worker = worker  # type: ignore[misc]
    process.main(*descriptors)
