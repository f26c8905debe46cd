"""A `tokenizers.Tokenizer` from the metadata of a GGUF file, by llama.cpp's rules.

Two families: `gpt2`, byte-level BPE with listed merges (Llama 3, Qwen, SmolLM2), and `llama`, SentencePiece BPE, whose
merges follow from the scores (Llama 2, Mistral, Yi). `tokenizer.ggml.pre` names how text is split before merging, and
with it whether a prompt begins with the beginning-of-sequence token (BOS) and whether words of the vocabulary are taken
whole. A name that stands in no group below is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_CONTROL, _SPECIAL, _USER_DEFINED = 3, (2, 3), 4  # tokenizer.ggml.token_type; special: unknown and control
_KEY = "tokenizer.ggml."
_USED_IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id")
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = frozenset({  # llama.cpp ends a generation at tokens of these texts, and treats them as control tokens
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


_NORMALIZED = ("qwen2", "deepseek-r1-qwen")  # to Unicode's NFC, as in their tokenizer.json
_LONGEST_MERGED = 512  # characters of a SentencePiece token: its splits are tried one by one


class _Splitting(NamedTuple):
    """How text is split before merging: by each pattern in turn, what it matches being a piece of its own."""

    names: str  # of tokenizer.ggml.pre, with spaces between
    patterns: tuple[str, ...]
    takes_whole_words: bool = False  # a word of the vocabulary even where no chain of merges leads to it
    adds_bos: bool = False


_SPLITTINGS = (
    _Splitting("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    _Splitting("gpt-2 phi-2 mpt olmo jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling", (_GPT2,)),
    _Splitting("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (r"\p{N}", _GPT2)),
    _Splitting(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        (f"{_CONTRACTIONS}|{_WORDS % '{1,3}'}|{_SPACES}",), takes_whole_words=True, adds_bos=True,
    ),
    _Splitting(
        "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open",
        (f"{_CONTRACTIONS}|{_WORDS % ''}|{_SPACES}",),
    ),
    _Splitting(
        "tekken", (rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
        takes_whole_words=True, adds_bos=True,
    ),
)  # fmt: skip


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `metadata` describes, special tokens included.

    Raises ValueError for a family or a way of splitting that is not known here, with those that are, and for special
    tokens whose ids are none.
    """
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    family = metadata.get(f"{_KEY}model")
    if family not in builders:
        raise ValueError(f"{_KEY}model is {family!r}; known are {', '.join(builders)}")
    special_ids(metadata)
    tokenizer = builders[family](metadata)
    _add_special_tokens(tokenizer, metadata)
    if metadata.get(f"{_KEY}add_bos_token", family == "llama" or _splitting(metadata).adds_bos):
        _prepend_bos(tokenizer, metadata)
    return tokenizer


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Ids by key (`bos_token_id`, ...) as far as the file has them; ValueError for one outside the vocabulary."""
    num_tokens = len(metadata[f"{_KEY}tokens"])
    ids = {key: metadata[_KEY + key] for key in _USED_IDS if _KEY + key in metadata}
    for key, token_id in ids.items():
        if not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
            raise ValueError(f"{_KEY}{key} is {token_id}: it must be from 0 to {num_tokens - 1}")
    return ids


def end_token_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """Tokens that end a turn: those that keys name, and those whose text is an end's in some family.

    llama.cpp also ends at the padding and separators of fill-in-the-middle, which end no turn.
    """
    named = {token_id for key, token_id in special_ids(metadata).items() if key in _END_IDS}
    return frozenset(named | {index for index, piece in enumerate(metadata[f"{_KEY}tokens"]) if piece in END_TEXTS})


def _splitting(metadata: Mapping[str, Any]) -> _Splitting:
    name = metadata.get(f"{_KEY}pre", "default")
    for splitting in _SPLITTINGS:
        if name in splitting.names.split():
            return splitting
    raise ValueError(f"{_KEY}pre is {name!r}; known are {' '.join(known_splittings())}")


def known_splittings() -> list[str]:
    """The names of `tokenizer.ggml.pre` that are not refused."""
    return [name for splitting in _SPLITTINGS for name in splitting.names.split()]


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    splitting = _splitting(metadata)
    merges = [_pair(merge) for merge in metadata[f"{_KEY}merges"]]
    bpe = models.BPE(_vocabulary(metadata), merges, ignore_merges=splitting.takes_whole_words)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    if metadata.get(f"{_KEY}pre") in _NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """Two pieces around a space; the first may be one itself."""
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = {piece: index for index, piece in enumerate(metadata[f"{_KEY}tokens"])}
    if len(vocabulary) < len(metadata[f"{_KEY}tokens"]):
        raise ValueError(f"{_KEY}tokens holds a token twice")
    return vocabulary


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    vocabulary = _vocabulary(metadata)
    unknown = metadata[f"{_KEY}tokens"][metadata.get(f"{_KEY}unknown_token_id", 0)]
    merges = _merges_by_score(vocabulary, metadata[f"{_KEY}scores"])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = metadata.get(f"{_KEY}add_space_prefix", True)
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
    if len(piece) > _LONGEST_MERGED:
        raise ValueError(f"{_KEY}tokens holds a token of {len(piece)} characters; the most are {_LONGEST_MERGED}")
    for at in range(1, len(piece)):
        if piece[:at] in vocabulary and piece[at:] in vocabulary:
            yield piece[:at], piece[at:]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    pieces = metadata[f"{_KEY}tokens"]
    kinds = metadata.get(f"{_KEY}token_type", [])
    typed = [(piece, _CONTROL if piece in END_TEXTS else kind) for piece, kind in zip(pieces, kinds, strict=False)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece, kind in typed if kind in _SPECIAL])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece, kind in typed if kind == _USER_DEFINED])


def _prepend_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    bos_id = special_ids(metadata).get("bos_token_id")
    if bos_id is None:
        raise ValueError(f"{_KEY}add_bos_token is set, or {_KEY}pre implies it, but there is no {_KEY}bos_token_id")
    bos = metadata[f"{_KEY}tokens"][bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
