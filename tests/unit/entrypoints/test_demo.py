"""The demo's verdicts: identical or not, tight or not."""

from sarathi.entrypoints.demo import BACKENDS, Measured, are_identical

MIB = 2**20


def measured(answers: list[list[int]], peak_bytes: int = 0) -> Measured:
    return Measured("sdpa_vattn_megacache", answers, 2.0, peak_bytes, own_bytes=10 * MIB, pages_bytes=2 * MIB)


def test_identical_means_every_token_of_every_backend_and_of_each_prompt_alone() -> None:
    answers = [[1, 2, 3], [4, 5, 6]]
    same = [measured(answers) for _ in BACKENDS]
    assert are_identical([[1, 2], [4, 5, 6]], same)
    assert not are_identical([[1, 9], [4, 5, 6]], same)
    assert not are_identical([[1, 2], [4, 5, 6]], [*same[:2], measured([[1, 2, 3], [4, 5, 7]])])


def test_tight_is_a_tenth_over_tokens_and_one_page_per_tensor_and_request() -> None:
    assert measured([], int(13.2 * MIB)).is_tight
    assert not measured([], int(13.2 * MIB) + 1).is_tight
    assert "13.1 MiB mapped <= 1.1 x (10.0 MiB of tokens + 2.0 MiB" in measured([], int(13.1 * MIB)).arithmetic()


def test_a_row_holds_rate_peak_own_and_the_difference() -> None:
    assert measured([[1, 2, 3], [4]], 12 * MIB).row() == (
        "sdpa_vattn_megacache",
        "2.0",
        "12.0 MiB",
        "10.0 MiB",
        "2.0 MiB",
    )
