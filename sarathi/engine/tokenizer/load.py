"""The tokenizer of a model, from its files.

The default model is a GGUF file, and reading its tokenizer imports neither torch nor transformers. Folders and hub ids
go through transformers' AutoTokenizer, which knows each family's peculiarities.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarathi.engine.tokenizer.chat_template import jinja_renderer, tokenizer_renderer
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.model_executor.loader.reading import CheckpointError, read_json, reading
from sarathi.wording import short_repr

if TYPE_CHECKING:
    from sarathi.model_executor.loader.source import ModelSource

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(source: "ModelSource", trust_remote_code: bool = False) -> Tokenizer | None:
    """The tokenizer of a model, with the model's end tokens; None where its files hold none, as a bare configuration.

    trust_remote_code: whether Python code in the folder may run. Raises ValueError where the files hold a tokenizer
    that cannot be used.
    """
    if source.format == "gguf":
        return _from_gguf(source.path)
    folder = _folder(source)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return _from_hugging_face(folder, load_end_token_ids(source), trust_remote_code)


def load_end_token_ids(source: "ModelSource") -> frozenset[int]:
    """The end tokens that a model's own files name, apart from any tokenizer: those of generation_config.json, else of
    config.json; of a GGUF file by llama.cpp's rules. ValueError where one is outside the vocabulary."""
    if source.format == "gguf":
        return _gguf_end_token_ids(source.path)
    config = source.path if source.format == "config" else source.path / "config.json"
    generation = config.with_name("generation_config.json")
    vocab_size = read_json(config).get("vocab_size") if config.is_file() else None
    for path in (generation, config):
        ends = _ends_in(path, vocab_size) if path.is_file() else None
        if ends is not None:
            return ends
    return frozenset()


def _folder(source: "ModelSource") -> Path:
    return source.path if source.path.is_dir() else source.path.parent


def _ends_in(path: Path, vocab_size: Any) -> frozenset[int] | None:
    """`eos_token_id`, one or a list; None where there is none."""
    value = read_json(path).get("eos_token_id")
    ends = value if isinstance(value, list) else [value]
    most = vocab_size if isinstance(vocab_size, int) else 2**31
    if value is None:
        return None
    if not all(type(token_id) is int and 0 <= token_id < most for token_id in ends):
        raise CheckpointError(f"{path}: eos_token_id is {short_repr(value)}: it must hold ids from 0 to {most - 1}")
    return frozenset(ends)


def _gguf_end_token_ids(path: Path) -> frozenset[int]:
    from sarathi.engine.tokenizer.gguf_tokenizer import end_token_ids

    metadata = _tokenizer_metadata(path)
    with reading(path, "GGUF tokenizer"):
        return end_token_ids(metadata) if "tokenizer.ggml.tokens" in metadata else frozenset()


def _tokenizer_metadata(path: Path) -> dict[str, Any]:
    from sarathi.model_executor.loader.gguf_file import GGUFFile

    file = GGUFFile(path)
    return {key: file[key] for key in file if key.startswith("tokenizer.")}


def _from_gguf(path: Path) -> Tokenizer | None:
    from sarathi.engine.tokenizer.gguf_tokenizer import build_tokenizer, end_token_ids, special_ids

    metadata = _tokenizer_metadata(path)
    if metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    with reading(path, "GGUF tokenizer"):
        pieces, ids = metadata["tokenizer.ggml.tokens"], special_ids(metadata)
        special = {key.removesuffix("_id"): pieces[ids[key]] for key in ids if key != "unknown_token_id"}
        template = metadata.get("tokenizer.chat_template")
        render_chat = jinja_renderer(template, special) if template else None
        return _tried(Tokenizer(build_tokenizer(metadata), end_token_ids(metadata), render_chat, template))


def _from_hugging_face(folder: Path, ends: frozenset[int], trust_remote_code: bool) -> Tokenizer:
    with reading(folder, "tokenizer"):
        _check_convertible(folder)
        tokenizer = _load(folder, trust_remote_code)
        if not tokenizer.is_fast:
            raise ValueError("there is no tokenizer.json, and none can be made of the other files")
        own = {tokenizer.eos_token_id} - {None}
        template = tokenizer.chat_template
        render_chat = tokenizer_renderer(tokenizer) if template else None
        shown = str(template) if template else None  # some models have several by name
        return _tried(Tokenizer(tokenizer.backend_tokenizer, ends | own, render_chat, shown))


def _load(folder: Path, trust_remote_code: bool) -> Any:
    """By AutoTokenizer, or by the class that it chooses where the choice is known: AutoTokenizer imports torch and much
    of transformers to choose, which takes 5 of the 8 seconds in which a server of a small model starts."""
    if _is_generic(folder):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _is_generic(folder: Path) -> bool:
    """Whether a Llama's tokenizer is what tokenizer.json says and no more, as with Llama 3."""
    names = ("config.json", "tokenizer_config.json")
    if not all((folder / name).is_file() for name in (*names, "tokenizer.json")):
        return False
    config, settings = (read_json(folder / name) for name in names)
    if "auto_map" in config or "auto_map" in settings or config.get("model_type") != "llama":
        return False
    return settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _tried(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that has encoded and decoded something: rules that name what is not there fail only then."""
    tokenizer.decode(tokenizer.encode("a"))
    return tokenizer


def _check_convertible(folder: Path) -> None:
    """tokenizer.model alone is a SentencePiece model (or tiktoken's), which a package of its own must read."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if missing:
        raise ValueError(
            "it holds tokenizer.model and no tokenizer.json: pip install sentencepiece protobuf, or convert it once "
            "where they are installed: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers"
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
