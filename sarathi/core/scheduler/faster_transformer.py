"""FasterTransformer: a batch is formed once and runs to its end; who comes meanwhile waits for the next one."""

from __future__ import annotations

from sarathi.core.scheduler.reserving import ReservingScheduler
from sarathi.core.scheduler.step import Step


class FasterTransformerScheduler(ReservingScheduler):
    """Even gaps between tokens, for nothing interrupts a batch; the first token waits for the batch before."""

    def _fill(self, step: Step) -> None:
        if not self.num_running:
            self._admit(step)
            return
        decodes, prefills = self._split()
        self._prefill(prefills, step)
        self._decode(decodes, step)
