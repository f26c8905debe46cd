"""A progress bar over requests with tokens a second; knows nothing of the engine but its outputs."""

import time
from types import TracebackType

from tqdm import tqdm

from sarathi.engine.outputs import RequestOutput

_REFRESH_S = 0.1  # drawing at every step would cost more than the step's own bookkeeping


class Progress:
    """Counts finished requests; beside the bar stand the tokens of prompts and of answers a second.

    Drawn on a terminal only: in a log file a bar is noise.
    """

    def __init__(self, num_requests: int, shown: bool) -> None:
        self._bar = tqdm(total=num_requests, desc="Requests", disable=None if shown else True, dynamic_ncols=True)
        self._start_s = time.monotonic()
        self._drawn_s = self._start_s
        self._tokens: dict[str, tuple[int, int]] = {}

    def count(self, output: RequestOutput) -> None:
        """Take in what a request has come to."""
        if self._bar.disable:
            return
        answered = sum(each.num_tokens for each in output.outputs)
        self._tokens[output.request_id] = len(output.prompt_token_ids), answered
        self._bar.update(output.finished)
        if time.monotonic() - self._drawn_s > _REFRESH_S:
            self._draw_rates()

    def _draw_rates(self) -> None:
        self._drawn_s = time.monotonic()
        read, written = (sum(counts) for counts in zip(*self._tokens.values(), strict=True))
        elapsed_s = self._drawn_s - self._start_s
        self._bar.set_postfix_str(f"in {read / elapsed_s:.0f} tokens/s, out {written / elapsed_s:.0f} tokens/s")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._tokens and not self._bar.disable:
            self._draw_rates()
        self._bar.close()
