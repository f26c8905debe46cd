"""Tokenizers built from GGUF metadata, and what a single token adds to a text."""

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from fake_engine import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from sarathi.engine.tokenizer.detokenizer import Detokenizer
from sarathi.engine.tokenizer.gguf_metadata import GGUFFormatError, read_metadata
from sarathi.engine.tokenizer.gguf_tokenizer import build_tokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer, load_tokenizer
from sarathi.model_executor.loader.source import ModelSource

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def bpe_metadata(pre: str, **changes: Any) -> dict[str, Any]:
    """All bytes, `1 2` and `a b` as merges, a control token and a token that users defined."""
    tokens = [*ALPHABET, "12", "ab", "<|end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "a b"],
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - 2) + [CONTROL, USER_DEFINED],
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece_metadata() -> dict[str, Any]:
    """`▁hello` is reached by merges of falling scores; bytes stand in for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    merged = ["he", "ll", "llo", "hello", "▁hello"]
    single = list("▁helo w,")
    pieces += merged + single
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(merged))] + [-1e9] * len(single),
        "tokenizer.ggml.token_type": kinds + [NORMAL] * (len(merged) + len(single)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_gguf(path: Path, pairs: dict[str, Any]) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(item: Any) -> bytes:
        if isinstance(item, str):
            return struct.pack("<I", 8) + text(item)
        if isinstance(item, bool):
            return struct.pack("<I?", 7, item)
        if isinstance(item, int):
            return struct.pack("<II", 4, item)
        if isinstance(item, float):
            return struct.pack("<If", 6, item)
        kind, packed = (
            (8, b"".join(map(text, item))) if isinstance(item[0], str) else (5, struct.pack(f"<{len(item)}i", *item))
        )
        return struct.pack("<IIQ", 9, kind, len(item)) + packed

    body = b"".join(text(key) + value(item) for key, item in pairs.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)


def pieces(tokenizer: Backend, text: str) -> list[str]:
    return [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in tokenizer.encode(text).ids]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", " ", "1", "2", "ab"]),
        ("qwen2", ["1", "2", " ", "1", "2", "ab"]),
        ("llama-bpe", ["12", " ", "12", "ab"]),
        ("gpt-2", ["12", " ", "12", "ab"]),
    ],
)
def test_numbers_are_split_as_the_family_does(pre: str, expected: list[str]) -> None:
    assert pieces(build_tokenizer(bpe_metadata(pre)), "12 12ab") == expected


@given(st.text())
def test_byte_level_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


TOKENIZER = build_tokenizer(bpe_metadata("smollm"))


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    tokenizer = Tokenizer(build_tokenizer(bpe_metadata("smollm")))
    ids = tokenizer.encode("a<|end|>b<tool>")
    assert [tokenizer.piece(token_id) for token_id in ids] == ["a", "<|end|>", "b", "<tool>"]
    assert [tokenizer.token_bytes(token_id) for token_id in ids] == [b"a", b"", b"b", b"<tool>"]
    assert tokenizer.decode(ids) == "ab<tool>"


def test_the_beginning_token_is_added_where_the_file_says_so() -> None:
    assert pieces(build_tokenizer(bpe_metadata("smollm", add_bos_token=True)), "a") == ["<|end|>", "a"]
    with_bos = Tokenizer(build_tokenizer(sentencepiece_metadata()))
    assert with_bos.encode("hello")[0] == 1
    assert 1 not in with_bos.encode("hello", add_special_tokens=False)


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer(build_tokenizer(sentencepiece_metadata()))
    ids = tokenizer.encode("hello world, é", add_special_tokens=False)
    assert [tokenizer.piece(token_id) for token_id in ids][:3] == [" hello", " ", "w"]
    assert bytes(tokenizer.token_bytes(ids[-1])) == "é".encode()[1:]
    stream = Detokenizer(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == " " + tokenizer.decode(ids)  # a text that has begun


@given(st.text(alphabet="helo w,é世🙂", min_size=1))
def test_sentencepiece_streams_as_one_shot_decoding(text: str) -> None:
    ids = SENTENCEPIECE.encode(text)
    stream = Detokenizer(SENTENCEPIECE)
    assert SENTENCEPIECE.decode(ids) == text
    assert "".join(map(stream.push, ids)) + stream.flush() == " " + text  # a stream goes on from a text before it


SENTENCEPIECE = Tokenizer(build_tokenizer(sentencepiece_metadata()))


def test_a_decoder_that_joins_words_with_spaces_streams_alike() -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "new": 2, "##er": 3, "day": 4}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = Tokenizer(backend)
    assert b"".join(map(tokenizer.token_bytes, [1, 2, 3, 4])) == b" a newer day"


@pytest.mark.parametrize(("key", "value"), [("model", "bert"), ("pre", "unheard-of")])
def test_unknown_families_are_refused_with_the_known_ones(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer.ggml.{key} is '{value}'; known are .*(llama|smollm)"):
        build_tokenizer(bpe_metadata("smollm") | {f"tokenizer.ggml.{key}": value})


def test_metadata_is_read_as_written(tmp_path: Path) -> None:
    pairs = {"a": 7, "b": "wörter", "c": [1, -2, 3], "d": ["x", "", "🙂"], "e": True, "f": 0.5, "g": [0]}
    write_gguf(tmp_path / "m.gguf", pairs)
    assert read_metadata(tmp_path / "m.gguf") == pairs


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path, {"a": "text", "b": [1, 2], "c": ["x"]})
    whole = path.read_bytes()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    for size in (0, 3, 4, 23, *random.Random(seed).sample(range(24, len(whole)), 10)):
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFFormatError, match=r"cut\.gguf"):
            read_metadata(path)


def test_a_gguf_file_becomes_a_tokenizer_with_ends_and_a_chat_template(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    changes = {"chat_template": template, "eot_token_id": 3}
    pairs = {key.replace("ggml.chat", "chat"): value for key, value in bpe_metadata("smollm", **changes).items()}
    write_gguf(tmp_path / "m.gguf", pairs)
    tokenizer = load_tokenizer(ModelSource("m", "gguf", tmp_path / "m.gguf"))
    assert tokenizer is not None
    end = pairs["tokenizer.ggml.eos_token_id"]
    assert tokenizer.eos_token_ids == {end, 3}
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [end, *tokenizer.encode("ab"), end]


def test_a_bare_configuration_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(ModelSource("m", "config", tmp_path / "config.json")) is None


def test_ids_without_a_piece_add_nothing() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.token_bytes(5000), tokenizer.piece(5000)) == (b"", "")
