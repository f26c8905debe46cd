"""A `tokenizers.Tokenizer` from the metadata of a GGUF file; knows nothing of weights, requests or text streams.

Two families: `gpt2`, byte-level BPE with listed merges (Llama 3, Qwen, SmolLM2), and `llama`, SentencePiece BPE, whose
merges follow from the scores (Llama 2, Mistral, Yi). `tokenizer.ggml.pre` names how text is split before merging.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_SPECIAL, _USER_DEFINED = (2, 3), 4  # tokenizer.ggml.token_type: unknown and control, user defined

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT_PATTERNS = {
    "llama-bpe": f"{_CONTRACTIONS}|{_WORDS_AND_SPACES % '{1,3}'}",
    "qwen2": f"{_CONTRACTIONS}|{_WORDS_AND_SPACES % ''}",
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "default": "gpt-2"}
_NAMES = ("gpt-2", "smollm", *_SPLIT_PATTERNS)


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `metadata` describes, special tokens included.

    Raises ValueError for a tokenizer family or a way of splitting that is not known here, with those that are.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    family = metadata.get("tokenizer.ggml.model")
    if family not in builders:
        raise ValueError(f"tokenizer.ggml.model is {family!r}; known are {', '.join(builders)}")
    tokenizer = builders[family](metadata)
    _add_special_tokens(tokenizer, metadata)
    if metadata.get("tokenizer.ggml.add_bos_token", family == "llama"):
        _prepend_bos(tokenizer, metadata)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    name = _ALIASES.get(name, name)
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 takes a whole word that is in the vocabulary even where no chain of merges leads to it.
    tokenizer = Tokenizer(models.BPE(_vocabulary(metadata), merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(metadata["tokenizer.ggml.tokens"])}


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name not in _SPLIT_PATTERNS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; known are {', '.join([*_NAMES, *_ALIASES])}")
    split = pre_tokenizers.Split(Regex(_SPLIT_PATTERNS[name]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    vocabulary = _vocabulary(metadata)
    unknown = metadata["tokenizer.ggml.tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_by_score(vocabulary, metadata["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefixed else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores highest; the same order as a list of merges."""
    best_first = sorted(vocabulary, key=lambda piece: -scores[vocabulary[piece]])
    return [pair for piece in best_first for pair in _splits(piece, vocabulary)]


def _splits(piece: str, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for at in range(1, len(piece)):
        if piece[:at] in vocabulary and piece[at:] in vocabulary:
            yield piece[:at], piece[at:]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    typed = list(zip(metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", []), strict=False))
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece, kind in typed if kind in _SPECIAL])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece, kind in typed if kind == _USER_DEFINED])


def _prepend_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    bos_id = metadata["tokenizer.ggml.bos_token_id"]
    bos = metadata["tokenizer.ggml.tokens"][bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
