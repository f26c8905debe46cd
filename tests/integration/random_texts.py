"""Random texts for tokenizers: words, numbers, contractions, spaces, scripts, emoji, marks and control tokens."""

import json
import random
from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CONTROL = ("<s>", "<|im_start|>", "<|endoftext|>")
WHOLE = ("HelloWorld", "Ġunmergeable", "1234567")  # words of the vocabulary to which no chain of merges leads
WORDS = (
    "the", " the", "don't", "I'm", "HELLO", "WorldWide", "HelloWorld", " unmergeable", "1234567", " 12345", "3.14159",
    "\n\n\n", "  \n ", "foo_bar", "https://x.org/a?b=1", *CONTROL, "def f(x):\n    return x", "  leading", "trailing  ",
    "'S", "I'LL", "\u2019s", "\u01c5", "\u2167", "\u00bd", "\u00b2", "e\u0301", "n\u0303o", "//", "\r\n", "\t\t",
)  # fmt: skip
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJ", "0123456789", "   \n\t\r", ".,;:!?'\"-_()[]{}<>/\\|@#$%^&*+=~`",
    "éüßñçøåÀÉ", "世界你好日本語", "привет мир", "😀🎉👍🏽", "\u0301\u0308\u200d\u00a0\u3000", "أهلا", "ไทยกำ",
    "한국어",
)  # fmt: skip
BLOCKS = (range(0x20, 0x2000), range(0x3000, 0xD000), range(0x1F300, 0x1FA00))


def random_text(rng: random.Random) -> str:
    return "".join(_piece(rng) for _ in range(rng.randint(1, 14)))


def _piece(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(WORDS)
    if rng.random() < 0.1:
        return chr(rng.choice(rng.choice(BLOCKS)))
    return "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 5)))


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges learned without any splitting, so that every wrong split of a text shows in its tokens."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=6000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((random_text(rng) for _ in range(8000)), trainer)
    learned = tokenizer.get_vocab()
    tokens = sorted(learned, key=learned.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    added = [token for token in (*WHOLE, *CONTROL) if token not in learned]
    return [*tokens, *added], [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
