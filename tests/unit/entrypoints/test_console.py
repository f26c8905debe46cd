"""What people see: answers in order, sizes, tables."""

import io
import random

from sarathi.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from sarathi.entrypoints.console import OrderedPrinter, format_size, format_table


def output_of(*texts: str, finished: bool) -> RequestOutput:
    reason = "stop" if finished else None
    outputs = [CompletionOutput(at, text, "", 1, reason, None, [], []) for at, text in enumerate(texts)]
    return RequestOutput("x", None, (1,), outputs, finished, RequestMetrics(0.0))


def test_answers_that_grow_together_are_printed_one_after_another() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abc ", k=rng.randint(0, 9))) for _ in range(5)]
    out, lengths = io.StringIO(), [0] * 5
    printer = OrderedPrinter(lambda number: f"<{number}>", out)
    while unfinished := [at for at in range(5) if lengths[at] <= len(texts[at])]:
        at = rng.choice(unfinished)
        printer.take(at, output_of(texts[at][: lengths[at]], finished=lengths[at] == len(texts[at])))
        lengths[at] += 1
    assert out.getvalue() == "".join(f"<{at}>{text}\n" for at, text in enumerate(texts))


def test_the_first_answer_is_live() -> None:
    out = io.StringIO()
    printer = OrderedPrinter(lambda number: "", out)
    printer.take(1, output_of("later", finished=True))
    printer.take(0, output_of("fir", finished=False))
    assert out.getvalue() == "fir"
    printer.take(0, output_of("first", finished=True))
    assert out.getvalue() == "first\nlater\n"


def test_several_answers_to_a_prompt_are_shown_when_all_are_there() -> None:
    out = io.StringIO()
    printer = OrderedPrinter(lambda number: "", out)
    printer.take(0, output_of("a", "b", finished=False))
    assert out.getvalue() == ""
    printer.take(0, output_of("aa", "bb", finished=True))
    assert out.getvalue() == "[0] aa\n[1] bb\n"


def test_sizes_read_as_people_write_them() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 2**20: "1.0 MiB", 5 * 2**40: "5.0 TiB"}
    assert {size: format_size(size) for size in sizes} == sizes
    assert format_size(2**60).endswith("TiB")


def test_columns_line_up() -> None:
    table = format_table(("name", "n"), [("a", "1000"), ("longer", "2")])
    assert table.splitlines() == ["name       n", "------  ----", "a       1000", "longer     2"]
