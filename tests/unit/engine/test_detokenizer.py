"""Streamed text equals one-shot text for any tokens and any stop strings, and never shows too much."""

import random
from cProfile import Profile

import pytest
from fake_engine import END, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from sarathi.engine.tokenizer.detokenizer import Detokenizer, SilentDetokenizer, StopMatcher

TOKENIZER = byte_tokenizer()
SHORT_ALPHABET = st.text(alphabet="ab界", max_size=30)
STOPS = st.lists(st.text(alphabet="ab界", min_size=1, max_size=4), max_size=6)


def cut_one_shot(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by one character until it ends with a stop string; naive, and the meaning of StopMatcher."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text())
def test_streamed_text_is_the_text(text: str) -> None:
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.push(token_id) for token_id in TOKENIZER.encode(text)]
    assert "".join(pieces) == text  # nothing is left to flush: all characters are whole
    assert stream.flush() == ""


@given(st.lists(st.integers(0, END)))
def test_any_tokens_stream_as_one_shot_decoding(token_ids: list[int]) -> None:
    stream = Detokenizer(TOKENIZER)
    text = "".join(map(stream.push, token_ids)) + stream.flush()
    assert text == TOKENIZER.decode(token_ids)


@given(st.text(min_size=1))
def test_no_prefix_ends_in_half_a_character(text: str) -> None:
    stream = Detokenizer(TOKENIZER)
    shown = ""
    for token_id in TOKENIZER.encode(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)


@given(SHORT_ALPHABET, STOPS, st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_stop_strings_cut_alike_however_the_text_comes(text: str, stops: list[str], rng: random.Random) -> None:
    expected, stop = cut_one_shot(text, stops)
    matcher, shown, rest = StopMatcher(stops), "", text
    while rest:
        size = rng.randint(1, 5)
        shown += matcher.push(rest[:size])
        assert expected.startswith(shown), "part of a stop string was shown"
        rest = rest[size:]
    assert (shown + matcher.flush(), matcher.matched) == (expected, stop)


def test_a_stop_string_is_held_back_only_while_it_can_come() -> None:
    matcher = StopMatcher(["STOP"])
    assert [matcher.push(piece) for piece in ("go ST", "O", "NE ", "ST", "OP", "more")] == [
        "go ",
        "",
        "STONE ",
        "",
        "",
        "",
    ]
    assert matcher.matched == "STOP"
    assert matcher.flush() == ""


def test_thousands_of_stop_strings_cost_as_much_as_a_few() -> None:
    """Counted in calls of Python and C, which no busy machine can disturb."""
    text = "the model is serving the engine \n" * 10
    num_calls = {}
    for count in (16, 4096):
        matcher, profile = StopMatcher([f"the engine is {number:04}" for number in range(count)]), Profile()
        shown = profile.runcall(list, map(matcher.push, text))
        assert "".join(shown) + matcher.flush() == text
        num_calls[count] = sum(entry.callcount for entry in profile.getstats())
    assert num_calls[4096] < 1.1 * num_calls[16]


def test_a_stop_string_that_starts_inside_a_multibyte_character_is_found() -> None:
    stream = Detokenizer(TOKENIZER, ["🙂end"])
    text = "".join(map(stream.push, TOKENIZER.encode("say 🙂e no 🙂end after"))) + stream.flush()
    assert (text, stream.matched_stop) == ("say 🙂e no ", "🙂end")


def test_what_may_not_stop_yet_passes_through() -> None:
    stream = Detokenizer(TOKENIZER, ["x"])
    assert [stream.push(ord(char), may_stop=at >= 2) for at, char in enumerate("axbx")] == ["a", "x", "b", ""]
    assert stream.matched_stop == "x"


@given(
    st.text(alphabet="abé", max_size=12),
    st.text(alphabet="abé", min_size=1, max_size=4),
    st.integers(0, 12),
    st.booleans(),
)
@settings(max_examples=300)
def test_a_stop_string_counts_where_it_ends_behind_min_tokens(
    text: str, stop: str, min_tokens: int, keep: bool
) -> None:
    """vLLM's rule: behind the first min_tokens tokens, search the new text and the stop's length before it."""
    token_ids = TOKENIZER.encode(text)
    so_far, expected = "", None
    for number, _ in enumerate(token_ids, 1):
        before, so_far = so_far, TOKENIZER.decode(token_ids[:number]).removesuffix("\ufffd")
        if number > min_tokens and len(so_far) > len(before):
            at = so_far.find(stop, max(0, len(before) - len(stop) + 1))
            if at >= 0:
                expected = so_far[: at + len(stop) * keep]
                break
    stream = Detokenizer(TOKENIZER, [stop], include_stop=keep)
    shown = [stream.push(token_id, number > min_tokens) for number, token_id in enumerate(token_ids, 1)]
    if expected is None:
        assert ("".join(shown) + stream.flush(), stream.matched_stop) == (text, None)
    else:
        assert ("".join(shown), stream.matched_stop, stream.flush()) == (expected, stop, "")


@given(st.lists(st.integers(0, END)), st.booleans())
def test_special_tokens_are_shown_as_in_one_shot_decoding(token_ids: list[int], spaces: bool) -> None:
    stream = Detokenizer(TOKENIZER, skip_special=False, spaces_between_special=spaces)
    text = "".join(map(stream.push, token_ids)) + stream.flush()
    assert text == TOKENIZER.decode(token_ids, skip_special_tokens=False)


class TextThenHalfACharacter:
    """A tokenizer whose only token ends inside a character."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"abc" + "é".encode()[:1]


def test_nothing_of_the_token_that_completed_a_stop_string_is_flushed() -> None:
    stream = Detokenizer(TextThenHalfACharacter(), ["bc"])
    assert (stream.push(0), stream.matched_stop, stream.flush()) == ("a", "bc", "")


def test_an_unfinished_character_is_flushed_as_a_replacement() -> None:
    stream = Detokenizer(TOKENIZER)
    assert stream.push("é".encode()[0]) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("count", [1, 50])
def test_without_a_tokenizer_there_is_no_text(count: int) -> None:
    stream = SilentDetokenizer()
    assert [stream.push(token_id) for token_id in range(count)] == [""] * count
    assert stream.flush() == "" and stream.matched_stop is None
