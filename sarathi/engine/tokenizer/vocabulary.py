"""A tokenizer as llguidance reads it: what each token is in bytes, and how text becomes tokens."""

from typing import Any

from sarathi.engine.tokenizer.tokenizer import Tokenizer


class _Tokens:
    """The attributes that llguidance's TokenizerWrapper asks for. Special tokens have names and no text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_token_id
        special = {token_id: tokenizer.special_bytes(token_id) for token_id in range(vocab_size)}
        self.special_token_ids = [token_id for token_id, name in special.items() if name]
        self.tokens = [name or tokenizer.token_bytes(token_id) for token_id, name in special.items()]

    def __call__(self, text: str | bytes) -> list[int]:
        shown = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(shown, add_special_tokens=False)


def make_vocabulary(tokenizer: Tokenizer, vocab_size: int, end_token_ids: frozenset[int]) -> Any:
    """An LLTokenizer of `vocab_size` tokens; an output may end at each of end_token_ids. Takes about half a second."""
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(end_token_ids)
    tokens = _Tokens(tokenizer, vocab_size, ends[0])
    return LLTokenizer(TokenizerWrapper(tokens), n_vocab=vocab_size, eos_token=ends)
