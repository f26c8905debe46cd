"""The demo's verdicts: identical or not, tight or not."""

from dataclasses import replace

import pytest

from sarathi.engine.outputs import CompletionOutput, Logprob
from sarathi.entrypoints.demo import BACKENDS, Measured, compare, with_median_time

MIB = 2**20
FLOAT32_EPS, BFLOAT16_EPS = 2**-23, 2**-7


def answer(*token_ids: int, second: int | None = None, gap: float = 0.0) -> CompletionOutput:
    """second: what was likely beside each token, `gap` nats less."""
    beside = {} if second is None else {second: Logprob(-0.5 - gap, "")}
    logprobs = [{token: Logprob(-0.5, ""), **beside} for token in token_ids]
    return CompletionOutput(0, "", "", len(token_ids), None, None, list(token_ids), logprobs)


def measured(answers: list[CompletionOutput], peak_bytes: int = 0, dtype_eps: float = FLOAT32_EPS) -> Measured:
    return Measured("sdpa_vattn_megacache", answers, 2.0, peak_bytes, 10 * MIB, 2 * MIB, dtype_eps)


def test_identical_means_every_token_of_every_backend_and_of_each_prompt_alone() -> None:
    same = [measured([answer(1, 2, 3), answer(4, 5, 6)]) for _ in BACKENDS]
    assert str(compare([answer(1, 2), answer(4, 5, 6)], same)) == "yes"
    alone = compare([answer(1, 9), answer(4, 5, 6)], same)
    backend = compare([answer(1, 2)], [measured([answer(1, 2, 3)]), measured([answer(1, 2, 7)])])
    for verdict in (alone, backend):
        assert not verdict.passed and str(verdict).startswith("no, diverging 1 times")


@pytest.mark.parametrize(("gap", "passed"), [(0.4, True), (0.6, False)])
def test_in_half_precision_two_tokens_as_likely_are_a_tie(gap: float, passed: bool) -> None:
    here, there = answer(1, 2, 3, second=9, gap=gap), answer(1, 9, 5)
    runs = [measured([each], dtype_eps=BFLOAT16_EPS) for each in (here, there)]
    verdict = compare([answer(1, 2, 3)], runs)
    assert verdict.passed == passed
    assert str(verdict).startswith("but for ties" if passed else "no")
    assert str(verdict).endswith(f"diverging 1 times, between tokens up to {gap:.3f} nats apart (rounding: 0.500)")


def test_in_float32_what_is_almost_as_likely_is_no_tie() -> None:
    verdict = compare([answer(9)], [measured([answer(1, second=9, gap=0.001)])])
    assert not verdict.passed


def test_tight_is_a_tenth_over_tokens_and_one_page_per_tensor_and_request() -> None:
    assert measured([], int(13.2 * MIB)).is_tight
    assert not measured([], int(13.2 * MIB) + 1).is_tight
    assert "13.1 MiB mapped <= 1.1 x (10.0 MiB of tokens + 2.0 MiB" in measured([], int(13.1 * MIB)).arithmetic()


def test_a_row_holds_rate_peak_own_and_the_difference() -> None:
    assert measured([answer(1, 2, 3), answer(4)], 12 * MIB).row() == (
        "sdpa_vattn_megacache",
        "2.0",
        "12.0 MiB",
        "10.0 MiB",
        "2.0 MiB",
    )


def test_a_slow_round_does_not_change_the_speed() -> None:
    first = measured([answer(1, 2)])
    rounds = [replace(first, elapsed_s=seconds) for seconds in (2.0, 90.0, 4.0)]
    assert with_median_time(rounds).row()[1] == "0.5"
