"""Tokenizers built from GGUF metadata, and what a single token adds to a text."""

import io
import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from sarathi.engine.tokenizer.detokenizer import Detokenizer
from sarathi.engine.tokenizer.gguf_tokenizer import END_TEXTS, build_tokenizer
from sarathi.engine.tokenizer.load import load_end_token_ids, load_tokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.model_executor.loader.gguf_file import GGUFFile
from sarathi.model_executor.loader.reading import CheckpointError
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
        ("llama-bpe", ["<|end|>", "12", " ", "12", "ab"]),
        ("gpt-2", ["12", " ", "12", "ab"]),
    ],
)
def test_numbers_are_split_as_the_family_does(pre: str, expected: list[str]) -> None:
    assert pieces(build_tokenizer(bpe_metadata(pre)), "12 12ab") == expected


@given(st.text())
def test_byte_level_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


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
    assert dict(GGUFFile(tmp_path / "m.gguf")) == pairs


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path, {"a": "text", "b": [1, 2], "c": ["x"]})
    whole = path.read_bytes()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    for size in (0, 3, 4, 23, *random.Random(seed).sample(range(24, len(whole)), 10)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            dict(GGUFFile(path))


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


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "tekken", "pixtral"])
def test_names_of_splitting_that_imply_the_beginning_token(pre: str) -> None:
    """llama.cpp: these add it unless the file says otherwise."""
    assert pieces(build_tokenizer(bpe_metadata(pre)), "a") == ["<|end|>", "a"]
    assert pieces(build_tokenizer(bpe_metadata(pre, add_bos_token=False)), "a") == ["a"]
    without = {key: value for key, value in bpe_metadata(pre).items() if not key.endswith("bos_token_id")}
    with pytest.raises(ValueError, match=r"there is no tokenizer\.ggml\.bos_token_id"):
        build_tokenizer(without)


SPLITS = [  # pre, a text, its pieces by the rules of the family's own tokenizer.json
    ("tekken", "HelloWorld 123 it's", ["Hello", "World", "1", "2", "3", "it", "'s"]),
    ("tekken", "ABC/\n\nx", ["ABC", "/\n\n", "x"]),
    ("llama-bpe", "HelloWorld 12345 it's", ["HelloWorld", "123", "45", "it", "'s"]),
    ("qwen2", "Hello 12 IT'S", ["Hello", "1", "2", "IT", "'S"]),
    ("gpt-2", "Hello 12345 IT'S", ["Hello", "12345", "IT", "'", "S"]),
    ("smollm", "Hello 12 it's", ["Hello", "1", "2", "it", "'s"]),
    ("default", "Hello 12345 a=b", ["Hello", "123", "45", "a", "=", "b"]),
]


@pytest.mark.parametrize(("pre", "text", "expected"), SPLITS)
def test_text_is_split_before_merging_as_the_family_does(pre: str, text: str, expected: list[str]) -> None:
    found = build_tokenizer(bpe_metadata(pre)).pre_tokenizer.pre_tokenize_str(text)
    words = [text[start:end].strip(" ") for _, (start, end) in found]
    assert [word for word in words if word] == expected
    assert "".join(text[start:end] for _, (start, end) in found) == text


def with_tokens(*tokens: str, **changes: Any) -> dict[str, Any]:
    """Metadata whose vocabulary ends in `tokens`, and no ids of special tokens."""
    metadata = bpe_metadata("qwen2")
    every = [*metadata["tokenizer.ggml.tokens"][:-2], *tokens]
    kinds = {"tokens": every, "token_type": [NORMAL] * len(every)} | changes
    metadata = {key: value for key, value in metadata.items() if not key.endswith("_id")}
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in kinds.items()}


@pytest.mark.parametrize(
    ("tokens", "named", "ends"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>", ["<|end_of_text|>", "<|eot_id|>"]),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", ["<|endoftext|>", "<|im_end|>"]),
        (["</s>", "<|odd|>"], "<|odd|>", ["</s>", "<|odd|>"]),
        (["<|fim_pad|>", "<|file_sep|>", "<|x|>"], "<|x|>", ["<|x|>"]),
    ],
)
def test_turns_end_where_they_do_in_llama_cpp(tokens: list[str], named: str, ends: list[str], tmp_path: Path) -> None:
    """Llama 3: {128001, 128009}; Qwen 3: {151643, 151645}."""
    metadata = with_tokens(*tokens)
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    metadata["tokenizer.ggml.eos_token_id"] = ids[named]
    write_gguf(tmp_path / "m.gguf", metadata)
    source = ModelSource("m", "gguf", tmp_path / "m.gguf")
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    assert tokenizer.eos_token_ids == load_end_token_ids(source) == {ids[end] for end in ends}
    for end in set(ends) & END_TEXTS:  # a control token, whatever type the file gives it
        assert tokenizer.encode(f"a{end}") == [*tokenizer.encode("a"), ids[end]]
        assert tokenizer.token_bytes(ids[end]) == b""


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id"])
def test_a_special_id_outside_the_vocabulary_names_file_and_key(key: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, bpe_metadata("smollm") | {f"tokenizer.ggml.{key}": 2**32 - 1})
    with pytest.raises(CheckpointError, match=rf"{file}.*tokenizer\.ggml\.{key} is 4294967295: it must be from 0"):
        load_tokenizer(ModelSource("m", "gguf", file))


def save_folder(folder: Path, **settings: Any) -> ModelSource:
    byte_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings))
    return ModelSource("m", "safetensors", folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, {3, 4}), ({"eos_token_id": 3}, {}, {3}),
        ({}, {"eos_token_id": [5, 6]}, {5, 6}), (None, {"eos_token_id": 5}, {5}), (None, {}, set()),
        ({"eos_token_id": None}, {"eos_token_id": None}, set()),
    ],
)  # fmt: skip
def test_end_tokens_of_a_folder(generation: Any, config: dict, expected: set[int], tmp_path: Path) -> None:
    """generation_config.json first, then config.json; without tokenizer files too."""
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_end_token_ids(ModelSource("m", "config", tmp_path / "config.json")) == expected
    source = save_folder(tmp_path)
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None and tokenizer.eos_token_ids == load_end_token_ids(source) == expected


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("decoder", ["byte_level", "metaspace"])
def test_a_llamas_generic_tokenizer_is_auto_tokenizers_choice(name: str, decoder: str, tmp_path: Path) -> None:
    source = save_folder(tmp_path, tokenizer_class=name, eos_token="a", add_bos_token=True, bos_token="b")
    if decoder == "metaspace":
        backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    ours = load_tokenizer(source)
    assert ours is not None and ours.backend.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.eos_token_ids == {theirs.eos_token_id}


def test_it_is_read_without_torch(tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    code = (
        "import sys; from pathlib import Path\n"
        "from sarathi.engine.tokenizer.load import load_tokenizer\n"
        "from sarathi.model_executor.loader.source import ModelSource\n"
        "assert load_tokenizer(ModelSource('m', 'safetensors', Path(sys.argv[1]))).encode('ab')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("value", [7, -1, [1, 2.5], "3", True, [None], {"a": 1}])
def test_an_end_token_that_is_no_id_names_file_and_key(value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 7, "eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id is .*ids from 0 to 6"):
        load_end_token_ids(ModelSource("m", "config", tmp_path / "config.json"))


def test_code_of_a_model_folder_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on stdin, and run the folder's code after `y`."""
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.EvilConfig"}
    source = save_folder(tmp_path, auto_map=auto_map, tokenizer_class="Evil")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\nEvilConfig = Evil\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(source)
    assert not (tmp_path / "ran").exists()


def test_a_sentencepiece_model_alone_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model and no tokenizer\.json: pip install sentencepiece"):
        load_tokenizer(ModelSource("m", "config", tmp_path / "config.json"))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE", "vocab": {"a": 5}, "merges": ["x y"]}}'])
def test_a_broken_tokenizer_is_an_error_that_names_the_folder(content: str, tmp_path: Path) -> None:
    source = save_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: corrupt or unreadable tokenizer"):
        load_tokenizer(source)


def test_a_bare_configuration_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(ModelSource("m", "config", tmp_path / "config.json")) is None


def test_ids_without_a_piece_add_nothing() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.token_bytes(5000), tokenizer.piece(5000)) == (b"", "")
