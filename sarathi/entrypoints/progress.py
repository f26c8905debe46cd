"""A progress bar over requests, with tokens a second."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from sarathi.engine.outputs import RequestOutput

_REFRESH_S = 0.1  # drawing at every step would cost more than the step's own bookkeeping
NumberedOutput = tuple[int, RequestOutput]


def show_progress(outputs: Iterable[NumberedOutput], num_requests: int) -> Iterator[NumberedOutput]:
    """Pass `outputs` on, counting finished requests and the tokens a second of prompts and of completions.

    Draws on a terminal only: in a log file a bar is noise.
    """
    with tqdm(total=num_requests, desc="Requests", disable=None, dynamic_ncols=True) as bar:
        if bar.disable:
            yield from outputs
            return
        counts: dict[int, tuple[int, int]] = {}
        start_s = drawn_s = time.monotonic()
        for number, output in outputs:
            counts[number] = len(output.prompt_token_ids), sum(each.num_tokens for each in output.outputs)
            bar.update(output.finished)
            if time.monotonic() - drawn_s > _REFRESH_S or bar.n == num_requests:
                drawn_s = time.monotonic()
                _draw_rates(bar, counts.values(), drawn_s - start_s)
            yield number, output


def _draw_rates(bar: "tqdm[Any]", counts: Iterable[tuple[int, int]], elapsed_s: float) -> None:
    read, written = (sum(each) for each in zip(*counts, strict=True))
    bar.set_postfix_str(f"in {read / elapsed_s:.0f} tokens/s, out {written / elapsed_s:.0f} tokens/s")
