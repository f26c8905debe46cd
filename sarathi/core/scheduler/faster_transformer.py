"""FasterTransformer: a batch is formed once and runs until all its requests end; later requests wait for the next."""

from __future__ import annotations

from sarathi.core.scheduler.orca import OrcaScheduler
from sarathi.core.scheduler.request_state import Step


class FasterTransformerScheduler(OrcaScheduler):
    """Even time between tokens, because nothing joins a running batch; memory is reserved as in Orca."""

    _may_defer = False  # what does not start with the batch waits for the end of all of it

    def _fill(self, step: Step) -> None:
        if not self.num_running:
            self._admit_waiting(step)
            return
        decodes, prefills = self._running.split()
        self._add_prefills(prefills, step)
        self._add_decodes(decodes, step)
