"""GGUF files beside llama.cpp: tokens of random texts, BOS, ends of turns, and greedy tokens."""

import random
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import llamacpp
import numpy as np
import pytest
from gguf_files import ALPHABET, MODELS, finish, write_gguf, write_vocabulary
from random_texts import CONTROL, random_text, vocabulary
from smollm2 import PROMPTS
from tiny_models import VOCAB_SIZE, build

from sarathi import LLM, SamplingParams
from sarathi.engine.tokenizer.gguf_tokenizer import END_TEXTS, known_splittings
from sarathi.engine.tokenizer.load import load_end_token_ids, load_tokenizer
from sarathi.model_executor.loader.source import ModelSource, resolve_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not llamacpp.is_installed(), reason="llama.cpp is not installed: pip install xllamacpp"),
]
NUM_TEXTS = 200
FILL_IN_THE_MIDDLE = {"<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}  # ends for llama.cpp, not for us
NORMALIZED = ("qwen2", "deepseek-r1-qwen")  # to NFC, as in Qwen's tokenizer.json and transformers; not in llama.cpp
TIE = 0.05  # of logits: llama.cpp keeps K and V in float16


def without_case_beyond_ascii(text: str) -> str:
    """Tekken splits words where their case changes. llama.cpp knows the case of ASCII alone, and no marks."""
    return "".join(each for each in text if each.isascii() or unicodedata.category(each)[0] not in "LM")


def given_to_llama_cpp(pre: str | None, text: str) -> str:
    return unicodedata.normalize("NFC", text) if pre in NORMALIZED else text


def test_every_known_splitting_gives_the_tokens_and_the_bos_of_llama_cpp(tmp_path: Path) -> None:
    rng = random.Random(random.randrange(2**32))
    texts = [random_text(rng) for _ in range(NUM_TEXTS)]
    jobs, ours = {}, {}
    for pre in (*known_splittings(), None):
        file = write_vocabulary(tmp_path / f"{pre}.gguf", pre, *vocabulary(), set(CONTROL))
        asked = list(map(without_case_beyond_ascii, texts)) if pre == "tekken" else texts
        jobs[str(pre)] = {"path": str(file), "texts": [given_to_llama_cpp(pre, text) for text in asked]}
        tokenizer = load_tokenizer(ModelSource("m", "gguf", file))
        assert tokenizer is not None
        ours[str(pre)] = [tokenizer.encode(text) for text in asked]
    theirs = llamacpp.ask(jobs)
    for name, job in jobs.items():
        for text, found, expected in zip(job["texts"], ours[name], theirs[name]["tokens"], strict=True):
            assert found == expected, (name, text)


def test_generation_ends_at_the_tokens_of_llama_cpp(tmp_path: Path) -> None:
    jobs, ours = {}, {}
    for text in sorted(END_TEXTS | FILL_IN_THE_MIDDLE):
        tokens = [*ALPHABET, "ab", text]
        eos = ("add_eos_token_id", len(ALPHABET))
        file = write_vocabulary(tmp_path / f"{len(jobs)}.gguf", "llama-bpe", tokens, ["a b"], set(), eos)
        jobs[text] = {"path": str(file)}
        ours[text] = sorted(load_end_token_ids(ModelSource("m", "gguf", file)))
    theirs = llamacpp.ask(jobs)
    for text in END_TEXTS:
        assert ours[text] == theirs[text]["ends"] == [len(ALPHABET), len(ALPHABET) + 1]
    for text in FILL_IN_THE_MIDDLE:
        assert (ours[text], theirs[text]["ends"]) == ([len(ALPHABET)], [len(ALPHABET), len(ALPHABET) + 1])


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_give_the_tokens_of_llama_cpp(name: str, tmp_path: Path) -> None:
    tiny, file = build(name, tmp_path), tmp_path / "m.gguf"
    write_gguf(tiny, name, file, ("add_tokenizer_model", "no_vocab"))
    prompts = [random.choices(range(VOCAB_SIZE), k=length) for length in (1, 17, 80)]
    check_greedy(file, file, prompts, 12)


def test_smollm2_writes_the_text_of_llama_cpp(tmp_path: Path) -> None:
    source, file = resolve_model("smollm2-135m"), tmp_path / "float32.gguf"
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    write_in_float32(source.path, file)
    try:
        check_greedy(source.path, file, [tokenizer.encode(prompt) for prompt in PROMPTS[:5]], 12)
    finally:
        file.unlink()  # half a gigabyte


def write_in_float32(file: Path, target: Path) -> None:
    """The same model with its weights dequantised: with Q8_0 weights llama.cpp quantises activations too."""
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(size) for size in reversed(tensor.shape)]))
    finish(writer)


def check_greedy(ours: Path, theirs: Path, prompts: list[list[int]], count: int) -> None:
    """The same tokens; where they part, both must be as likely for llama.cpp but for its rounding."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    with LLM(str(ours), device="cpu", memory_bytes=2**27, max_num_seqs=4) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    job: dict[str, Any] = {"path": str(theirs), "prompts": prompts, "count": count}
    for tokens, expected in zip(found, llamacpp.ask({"": job})[""]["greedy"], strict=True):
        at = next((at for at, (token, _) in enumerate(expected) if token != tokens[at]), None)
        assert at is None or expected[at][1] < TIE, (at, expected[at], tokens[at])
