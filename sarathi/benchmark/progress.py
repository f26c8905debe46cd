"""A progress bar with the tokens of the last moment. Knows no engine; it is told what came out of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

from sarathi.engine.outputs import RequestOutput

REFRESH_S = 0.5


class ProgressBar:
    """One unit a request; a context manager."""

    def __init__(self, total: int, label: str, shown: bool) -> None:
        self._bar = tqdm(total=total, desc=label, unit="req", disable=not shown)
        self._tokens, self._since_s = 0, time.monotonic()

    def count(self, outputs: Sequence[RequestOutput]) -> None:
        """Outputs of one step: one token each, and requests that ended."""
        self._tokens += len(outputs)
        finished = sum([output.finished for output in outputs])
        if finished:
            self._bar.update(finished)
        self._refresh()

    def _refresh(self) -> None:
        elapsed_s = time.monotonic() - self._since_s
        if elapsed_s >= REFRESH_S:
            self._bar.set_postfix_str(f"{self._tokens / elapsed_s:.0f} output tok/s")
            self._tokens, self._since_s = 0, time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
