"""Terminal output: ordered streams, sizes, tables."""

import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from sarathi.engine.outputs import RequestOutput

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class OrderedPrinter:
    """Prints concurrent answers in order: streams the first unfinished one and buffers the others."""

    def __init__(self, header: Callable[[int], str], out: TextIO | None = None) -> None:
        self._header = header
        self._out = out or sys.stdout
        self._latest: dict[int, RequestOutput] = {}
        self._current = 0
        self._printed = -1  # printed characters of the current answer; -1 before its header

    def take(self, number: int, output: RequestOutput) -> None:
        """Take the latest output of answer `number`."""
        self._latest[number] = output
        while self._current in self._latest and self._print_current():
            del self._latest[self._current]
            self._current, self._printed = self._current + 1, -1

    def _print_current(self) -> bool:
        """Print the new text of the current answer; returns whether it is finished."""
        output = self._latest[self._current]
        if self._printed < 0:
            self._out.write(self._header(self._current))
            self._printed = 0
        text = shown_text(output)
        self._out.write(text[self._printed :] + "\n" * output.finished)
        self._out.flush()
        self._printed = len(text)
        return output.finished


def shown_text(output: RequestOutput) -> str:
    """The text of the answer; several answers are labelled by index and shown once all have finished."""
    if len(output.outputs) == 1:
        return output.outputs[0].text
    if not output.finished:
        return ""
    return "\n".join(f"[{each.index}] {each.text}" for each in output.outputs)


def format_size(num_bytes: int) -> str:
    """Human-readable size: 1536 -> "1.5 KiB"."""
    power = max(0, min(num_bytes.bit_length() - 1, 10 * len(_UNITS) - 1) // 10)
    return f"{num_bytes} B" if power == 0 else f"{num_bytes / 2 ** (10 * power):.1f} {_UNITS[power]}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(_format_row(row, widths) for row in (header, rule, *rows))


def _format_row(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])
