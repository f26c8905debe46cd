"""Progress bar over requests with the current tokens per second, on a terminal or in a notebook."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from sarathi.engine.outputs import RequestOutput

_REFRESH_S = 0.5  # redrawing at every step would be expensive
NumberedOutput = tuple[int, "RequestOutput"]


class RequestBar:
    """A context manager; one unit per request. shown: None: only on a terminal or in a notebook."""

    def __init__(self, total: int, label: str = "Requests", shown: bool | None = None) -> None:
        hidden = None if shown is None else not shown
        self._bar: Any = tqdm(total=total, desc=label, unit="req", disable=hidden, dynamic_ncols=True)
        self._read = self._written = 0
        self._since_s = time.monotonic()

    @property
    def is_hidden(self) -> bool:
        return bool(self._bar.disable)

    def add(self, finished: int, output_tokens: int = 0, prompt_tokens: int = 0) -> None:
        """Add finished requests and tokens."""
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
    """Yield `outputs` and show a progress bar on a terminal or in a notebook."""
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
