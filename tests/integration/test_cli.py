"""The command line on small models of random weights: streams, JSON, files, pipes, chat."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import save_tiny_config, save_tiny_model

from sarathi import __version__
from sarathi.entrypoints.cli import main

SMALL = ["--device", "cpu", "--memory-bytes", "8mb", "--max-num-seqs", "4", "--max-tokens", "6"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path / "model")


def generate(model: str, *words: str) -> int:
    return main(["generate", "--model", model, *SMALL, *words])


def test_help_is_instant_and_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from sarathi.entrypoints.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "import sarathi; sarathi.SamplingParams\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout and "--help-knobs" in result.stdout and len(result.stdout.splitlines()) < 40
    assert "--watermark" not in result.stdout and "--temperature 0" in result.stdout


@pytest.mark.parametrize("command", ["generate", "chat", "demo", "serve"])
def test_help_knobs_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help-knobs"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--chunk-budget-policy" in shown and "--enforce-eager" in shown
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--chunk-budget-policy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--max-num-batched-tokens=5", "it is called chunk_size here"),
        ("--chunk-sise=5", "the nearest option is --chunk-size"),
        (
            "--tempratur=1",
            "sarathi generate: unrecognized arguments: --tempratur=1 (the nearest option is --temp",
        ),
        ("--quantization=awq", "it is not supported here"),
        ("--colour=red", "no known setting has a similar name"),
    ],
)
def test_an_unknown_option_says_what_to_write(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "hi", word])
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_switches_and_inner_knobs_stand_alone(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "hi", "--enforce-eager", "--chunk-budget-policy", "latency") == 0


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(command: str) -> None:
        raise ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp")

    monkeypatch.setattr("sarathi.entrypoints.cli._command", fail)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "sarathi env: aiohttp is not installed: pip install 'sarathi-vattention[bench]'\n"


def test_a_prompt_is_completed_and_repeats_with_its_seed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert generate(model, "hello", "--seed", "3") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 1


def test_json_holds_everything(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--n", "2", "--seed", "1", "--logprobs", "1", "--prompt-logprobs", "0"]
    assert generate(model, "hello", "wörld", "--json", *words) == 0
    objects = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda each: each["index"])
    assert [each["prompt"] for each in objects] == ["hello", "wörld"]
    assert [each["prompt_tokens"] for each in objects] == [5, 6]
    assert [[len(entry) for entry in each["prompt_logprobs"]] for each in objects] == [[0, *[1] * 4], [0, *[1] * 5]]
    for answer in (answer for each in objects for answer in each["outputs"]):
        assert len(answer["token_ids"]) == len(answer["logprobs"]) <= 6
        assert answer["finish_reason"] in ("length", "stop")
        assert answer["logprobs"][0][0]["token_id"] == answer["token_ids"][0]


def test_prompts_from_a_file_come_out_in_order(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("first\n\nsecond\n")
    assert generate(model, "--prompt-file", str(tmp_path / "prompts.txt"), "--temperature", "0") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- first\n") and shown.index("--- first") < shown.index("--- second")


def test_standard_input_is_one_prompt(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(model, "two\nlines", "--temperature", "0") == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    assert generate(model, "--temperature", "0") == 0
    assert capsys.readouterr().out == expected


def test_token_ids_are_prompts_where_there_is_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        generate(save_tiny_config(tmp_path / "bare"), "--load-format", "dummy", "--prompt-token-ids", "1,2,3", "--json")
        == 0
    )
    [answer] = json.loads(capsys.readouterr().out)["outputs"]
    assert answer["text"] == "" and len(answer["token_ids"]) == 6


def test_chat_puts_the_prompt_into_the_models_format(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "hi", "--chat", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len("user: hi\nassistant:")


def test_a_chat_goes_on_over_commands_and_refused_messages(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["hello", "/unknown", "/system be brief", "", "x" * 300, "hello", "/reset", "hello", "/exit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "--model", model, *SMALL]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("tokens/s") == 3
    assert shown.err.count("longest sequence") == 1 and "/reset makes room" in shown.err


def test_a_reader_that_leaves_is_no_traceback(model: str) -> None:
    command = [
        sys.executable,
        "-m",
        "sarathi.entrypoints.cli",
        "generate",
        "--model",
        model,
        *SMALL,
        "--json",
        *["x"] * 20,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(120) == 1


def test_env_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert lines["torch"][0].isdigit()


def test_the_package_is_the_command() -> None:
    words = [sys.executable, "-m", "sarathi", "--version"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, f"sarathi {__version__}\n")
