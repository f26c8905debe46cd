"""Text whose number of tokens is known, by the server's tokenizer. Knows no requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sarathi.model_executor.loader.reading import reading

_WORD = re.compile("[Ġ▁]?([a-z]+)")  # in byte-level vocabularies, in those of SentencePiece


class Vocabulary:
    """The words that a tokenizer keeps whole wherever they stand: n of them, with spaces between, are n tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_special_tokens: int = tokenizer.num_special_tokens_to_add()
        matches = map(_WORD.fullmatch, tokenizer.get_vocab())
        candidates = sorted({match.group(1) for match in matches if match})
        alone, twice = self._counts(candidates), self._counts([f"{word} {word}" for word in candidates])
        counts = zip(candidates, alone, twice, strict=True)
        self.words = [word for word, one, two in counts if (one, two) == (1, 2)]

    def text(self, indices: Sequence[int]) -> str:
        """A word for each index below `len(words)`."""
        return " ".join(self.words[index] for index in indices)

    def count(self, text: str) -> int:
        """Tokens of the text alone, without those that begin or end a prompt."""
        return self._counts([text])[0]

    def _counts(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def load_vocabulary(name: str) -> Vocabulary:
    """Of a folder or a hub id; ValueError where there is no tokenizer, or none with whole words."""
    from transformers import AutoTokenizer

    try:
        with reading(name, "tokenizer"):
            vocabulary = Vocabulary(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except ValueError as error:
        reason, *_ = str(error).split("\n")
        raise ValueError(f"--tokenizer {name!r} cannot be loaded: {reason}") from error
    if not vocabulary.words:
        raise ValueError(f"--tokenizer {name!r}: it keeps no word whole, as text of a known length needs")
    return vocabulary
