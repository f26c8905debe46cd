"""GGUF files, beside llama.cpp."""

from pathlib import Path
from typing import Any

import gguf
import llamacpp
from comparison import PROMPT, Values, compared, generate, said
from gguf_files import ALPHABET, write_gguf, write_vocabulary
from tiny_models import build
from transformers import Qwen2Tokenizer

from sarathi.engine.tokenizer.load import load_end_token_ids, load_tokenizer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.model_executor.loader.source import ModelSource

TOKENIZE, GREEDY = "llama.cpp `llama_tokenize`", "llama.cpp `llama_decode`"
LLAMA = "integration/test_llama_cpp.py"
SPLITS = f"{LLAMA}::test_every_known_splitting_gives_the_tokens_and_the_bos_of_llama_cpp"
ENDS = f"{LLAMA}::test_generation_ends_at_the_tokens_of_llama_cpp"
TINY = f"{LLAMA}::test_tiny_models_give_the_tokens_of_llama_cpp"
LOADER = "unit/model_executor/test_loader.py"
SPECIAL = "unit/engine/test_tokenizer.py::test_a_special_id_outside_the_vocabulary_names_file_and_key"
MERGES = ["a b", "1 2", "12 3", "H e", "Ã ©", "Ã ī", "He Ãī"]  # in byte-level letters: Ã© is é, Ãī is É
TOKENS = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]


def source(file: Path) -> ModelSource:
    return ModelSource("m", "gguf", file)


def vocabulary_file(folder: Path, pre: str, *tokens: str, extra: Any = ()) -> Path:
    return write_vocabulary(folder / "m.gguf", pre, [*TOKENS, *tokens], MERGES, set(tokens), *extra)


def theirs(file: Path, **job: Any) -> dict[str, Any] | None:
    return llamacpp.ask({"": {"path": str(file), **job}})[""]


def tokens_of(file: Path, text: str) -> Values:
    answer, ours = theirs(file, texts=[text]), load_tokenizer(source(file))
    assert answer is not None and ours is not None
    return Values(shown(ours, answer["tokens"][0]), shown(ours, ours.encode(text)))


def shown(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    pieces = [tokenizer.backend.id_to_token(token) or "" for token in ids]
    return [piece.replace("Ġ", " ").replace("Ċ", "\\n") for piece in pieces]


@compared("`pre` llama-bpe, no `add_bos_token`: `12345 ab`", TOKENIZE, SPLITS)
def bos(folder: Path) -> Values:
    return tokens_of(vocabulary_file(folder, "llama-bpe", "<s>"), "12345 ab")


@compared("`pre` qwen2: `12345 ab`", TOKENIZE, SPLITS)
def digits(folder: Path) -> Values:
    return tokens_of(vocabulary_file(folder, "qwen2", "<s>"), "12345 ab")


def ends_of(folder: Path, *tokens: str, eos: str) -> Values:
    number = len(TOKENS) + tokens.index(eos)
    file = vocabulary_file(
        folder, "llama-bpe", *tokens, extra=[("add_eos_token_id", number), ("add_add_bos_token", False)]
    )
    answer, names = theirs(file), [*TOKENS, *tokens]
    assert answer is not None
    ours = sorted(load_end_token_ids(source(file)))
    return Values([names[index] for index in answer["ends"]], [names[index] for index in ours])


@compared("ends of Llama 3: `eos_token_id` is `<\\|end_of_text\\|>`", "llama.cpp `llama_vocab_is_eog`", ENDS)
def llama3_ends(folder: Path) -> Values:
    return ends_of(folder, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", eos="<|end_of_text|>")


@compared("ends of Qwen 3: `eos_token_id` is `<\\|im_end\\|>`", "llama.cpp `llama_vocab_is_eog`", ENDS)
def qwen3_ends(folder: Path) -> Values:
    return ends_of(folder, "<|endoftext|>", "<|im_start|>", "<|im_end|>", eos="<|im_end|>")


@compared(
    "an end of turn beside `<\\|fim_pad\\|>`", "llama.cpp `llama_vocab_is_eog`", ENDS,
    why="Padding and separators of fill-in-the-middle end no turn.",
)  # fmt: skip
def fill_in_the_middle(folder: Path) -> Values:
    return ends_of(folder, "<|fim_pad|>", "<|im_end|>", eos="<|im_end|>")


def greedy_of(folder: Path, *extra: tuple[Any, ...], **changes: Any) -> Values:
    file = folder / "m.gguf"
    write_gguf(build("llama2", folder, **changes), "llama2", file, ("add_tokenizer_model", "no_vocab"), *extra)
    answer = theirs(file, prompts=[PROMPT], count=6)
    assert answer is not None
    return Values([token for token, _ in answer["greedy"][0]], generate(file))


@compared("`rope.scaling.factor` 4 without `rope.scaling.type`", GREEDY, TINY)
def factor_alone(folder: Path) -> Values:
    return greedy_of(folder, ("add_rope_scaling_factor", 4.0))


@compared("`rope.scale_linear` 4", GREEDY, f"{LOADER}::test_rope_scaling_of_a_gguf_file_by_llama_cpps_rules")
def scale_linear(folder: Path) -> Values:
    return greedy_of(folder, ("add_float32", "llama.rope.scale_linear", 4.0))


@compared(
    "arch llama with biases of query, key, value and output", GREEDY,
    "unit/worker/test_gguf_models.py::test_each_bias_of_a_llama_file_reaches_the_logits",
)  # fmt: skip
def biases(folder: Path) -> Values:
    return greedy_of(folder, attention_bias=True)


@compared("YaRN of factor 4 over 64 tokens", GREEDY, TINY)
def yarn(folder: Path) -> Values:
    scaling = [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]
    return greedy_of(folder, *scaling, ("add_rope_scaling_orig_ctx_len", 64))


def opened(file: Path) -> Values:
    answer = theirs(file)
    return Values("refused" if answer is None else "loads", said(lambda: load_tokenizer(source(file)) and "loads"))


@compared(
    "`eos_token_id` 4294967295", "llama.cpp `llama_model_load_from_file`", SPECIAL,
    why="An id outside the vocabulary is an error that names file and key; llama.cpp warns and goes on with another.",
)  # fmt: skip
def eos_out_of_range(folder: Path) -> Values:
    return opened(vocabulary_file(folder, "smollm", "<s>", extra=[("add_eos_token_id", 2**32 - 1)]))


@compared(
    "`pre` qwen2: `e` and a combining acute accent", TOKENIZE, SPLITS,
    why="Qwen's tokenizer.json and transformers' `Qwen2Tokenizer` compose characters (NFC) first.",
)  # fmt: skip
def composed(folder: Path) -> Values:
    return tokens_of(vocabulary_file(folder, "qwen2", "<s>"), "e\u0301")


@compared("`pre` qwen2: `e` and a combining acute accent", "transformers `Qwen2Tokenizer`", SPLITS)
def composed_by_transformers(folder: Path) -> Values:
    ours = load_tokenizer(source(vocabulary_file(folder, "qwen2", "<|endoftext|>")))
    assert ours is not None
    ids = {token: index for index, token in enumerate([*TOKENS, "<|endoftext|>"])}
    theirs = Qwen2Tokenizer(vocab=ids, merges=[tuple(merge.split()) for merge in MERGES])
    return Values(shown(ours, theirs.encode("e\u0301")), shown(ours, ours.encode("e\u0301")))


@compared(
    "`pre` tekken: `HeÉ`", TOKENIZE, SPLITS,
    why="Tekken's tokenizer.json splits before the capital É. llama.cpp knows the case of ASCII letters alone.",
)  # fmt: skip
def case_beyond_ascii(folder: Path) -> Values:
    return tokens_of(vocabulary_file(folder, "tekken", "<s>"), "HeÉ")
