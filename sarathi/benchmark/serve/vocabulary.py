"""Text with a known number of tokens in the server's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sarathi.model_executor.loader.reading import reading
from sarathi.model_executor.loader.source import DEFAULT_MODEL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORD = re.compile("[Ġ▁]?([a-z]+)")  # in byte-level vocabularies, in those of SentencePiece


class Vocabulary:
    """Words that are one token in any position: n of them, separated by spaces, are n tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_special_tokens: int = tokenizer.num_special_tokens_to_add(is_pair=False)
        matches = map(_WORD.fullmatch, tokenizer.get_vocab())
        candidates = sorted({match.group(1) for match in matches if match})
        alone, twice = self._counts(candidates), self._counts([f"{word} {word}" for word in candidates])
        counts = zip(candidates, alone, twice, strict=True)
        self.words = [word for word, one, two in counts if (one, two) == (1, 2)]

    def text(self, indices: Sequence[int]) -> str:
        """Text of one word per index; each must be below `len(words)`."""
        return " ".join(self.words[index] for index in indices)

    def count(self, text: str) -> int:
        """Number of tokens of the text, without special tokens."""
        return self._counts([text])[0]

    def _counts(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]


def load_vocabulary(name: str) -> Vocabulary:
    """Load from a folder, hub id, .gguf file or smollm2-135m. ValueError if it has no tokenizer or no usable words."""
    try:
        with reading(name, "tokenizer"):
            vocabulary = Vocabulary(_load(name))
    except ValueError as error:
        reason, *_ = str(error).split("\n")
        raise ValueError(f"--tokenizer {name!r} cannot be loaded: {reason}") from error
    if not vocabulary.words:
        raise ValueError(f"--tokenizer {name!r}: no word is a single token, so text of a known length cannot be made")
    return vocabulary


def _load(name: str) -> Tokenizer:
    if name.lower() == DEFAULT_MODEL or name.endswith(".gguf"):
        from sarathi.engine.tokenizer.load import load_tokenizer
        from sarathi.model_executor.loader.source import resolve_model

        tokenizer = load_tokenizer(resolve_model(name))
        if tokenizer is None:
            raise ValueError("the file holds no tokenizer")
        return tokenizer.backend
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not loaded.is_fast:
        raise ValueError("there is no tokenizer.json, and none can be made of the other files")
    backend: Tokenizer = loaded.backend_tokenizer
    return backend
