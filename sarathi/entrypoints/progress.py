"""The progress bar over requests, on a terminal or in a notebook, with the tokens a second of the last moment."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from sarathi.engine.outputs import RequestOutput

_REFRESH_S = 0.5  # drawing at every step would cost more than the step's own bookkeeping
NumberedOutput = tuple[int, "RequestOutput"]


class RequestBar:
    """One unit a request; a context manager. shown: None: not in a log file, where a bar is noise."""

    def __init__(self, total: int, label: str = "Requests", shown: bool | None = None) -> None:
        hidden = None if shown is None else not shown
        self._bar: Any = tqdm(total=total, desc=label, unit="req", disable=hidden, dynamic_ncols=True)
        self._read = self._written = 0
        self._since_s = time.monotonic()

    @property
    def is_hidden(self) -> bool:
        return bool(self._bar.disable)

    def add(self, finished: int, output_tokens: int = 0, prompt_tokens: int = 0) -> None:
        """Count requests that ended, and tokens."""
        self._read += prompt_tokens
        self._written += output_tokens
        if finished:
            self._bar.update(finished)
        elapsed_s = time.monotonic() - self._since_s
        if elapsed_s >= _REFRESH_S:
            prompt = f"in {self._read / elapsed_s:.0f}, " if self._read else ""
            self._bar.set_postfix_str(f"{prompt}out {self._written / elapsed_s:.0f} tokens/s")
            self._read = self._written = 0
            self._since_s = time.monotonic()

    def __enter__(self) -> "RequestBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()


def show_progress(outputs: Iterable[NumberedOutput], num_requests: int) -> Iterator[NumberedOutput]:
    """Pass `outputs` on, and draw a bar where there is a terminal or a notebook."""
    with RequestBar(num_requests) as bar:
        if bar.is_hidden:
            yield from outputs
            return
        written: dict[int, int] = {}
        for number, output in outputs:
            total = sum(each.num_tokens for each in output.outputs)
            prompt_tokens = 0 if number in written else len(output.prompt_token_ids)
            bar.add(output.finished, total - written.get(number, 0), prompt_tokens)
            written[number] = total
            yield number, output
