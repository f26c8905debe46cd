"""The process of a rank, with steps in which one that computes prompts for others has too little memory."""

from itertools import count

from sarathi.executor.ranks import process, service
from sarathi.messages import SchedulerOutput
from sarathi.worker.worker import Worker

SHORT_STEPS = (0, 3, 4)


class ShortSender(Worker):
    """Refuses some steps after it has mapped their memory."""

    _numbers = count()

    def prepare(self, out: SchedulerOutput) -> int | None:
        rows = super().prepare(out)
        may_be_short = self.sending is not None and bool(out.chunks)
        if not may_be_short or rows is not None or next(self._numbers) not in SHORT_STEPS:
            return rows
        self.cancel(out)
        return self.capacity.rows - 1


def main(*descriptors: int) -> None:
    """See sarathi.executor.ranks.process.main."""
    service.Worker = ShortSender  # type: ignore[misc]
    process.main(*descriptors)
