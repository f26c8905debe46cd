"""What a user can put right is one line and exit code 2, whichever script is asked for it."""

import importlib.util
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sarathi.benchmark.records import join_engines

ROOT = Path(__file__).parents[3]
WITHOUT_CUDA = {
    "scripts/benchmark_engine.py": "kernel 'fa' runs on cuda, not on cpu",
    "scripts/benchmark_kernels.py": "kernels are measured on a CUDA device, but none is available",
    "scripts/benchmark_layouts.py": "kernel 'fa' runs on cuda, not on cpu",
    "scripts/soak.py": "kernel 'fa' runs on cuda, not on cpu",
}
WRONG = [
    ("scripts/benchmark_engine.py --test --backend foo", "'foo' is unknown; the nearest known word"),
    ("scripts/benchmark_page_size.py --trace /nope.csv", "'/nope.csv' is neither a file nor a shipped shape"),
    ("scripts/benchmark_vllm.py --join /ours.csv /theirs.csv", "No such file or directory: '/theirs.csv'"),
    ("scripts/benchmark_cpu.py --model foo", "no such folder or file, and no known name"),
    ("examples/compare_backends.py --backends foo", "'foo' is unknown; the nearest known word"),
]


@pytest.fixture(autouse=True)
def log_level_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    """A script may set it for its whole process, which here is that of the other tests."""
    caplog.set_level(logging.WARNING, logger="sarathi")


def said_by(
    name: str, *words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line on stderr with which a script ends."""
    monkeypatch.setattr(sys, "argv", [name, *words, "--output", str(folder)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"{Path(name).name}: ") and said.count("\n") == 1
    return said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", WITHOUT_CUDA)
def test_scripts_that_need_a_gpu_say_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith("kernels.py"):
        pytest.importorskip("triton")
    words = () if name.endswith("kernels.py") else ("--model", "tiny")
    assert WITHOUT_CUDA[name] in said_by(name, *words, folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="there is vLLM")
def test_a_peer_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_by("scripts/benchmark_vllm.py", folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert "pip install vllm" in said


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[words for words, _ in WRONG])
def test_wrong_words_are_told_in_a_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in said_by(*words.split(), folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)


def test_files_to_join_are_read_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.csv").write_text("model,work,backend,batch,context,value,unit\n")
    with pytest.raises(FileNotFoundError):
        join_engines(tmp_path / "ours.csv", tmp_path / "theirs.csv", tmp_path / "joined" / "vllm.csv")
    assert not (tmp_path / "joined").exists()
