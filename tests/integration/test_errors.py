"""What users get wrong, on the command line (one clear line, exit code) and in Python (the engine stays alive)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import save_tiny_config, save_tiny_model

from sarathi import LLM, SamplingParams
from sarathi.entrypoints.cli import main

KNOBS: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "memory_bytes": "8mb", "max_num_seqs": 4}


def write_broken(folder: Path) -> str:
    name = save_tiny_model(folder)
    (folder / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0" + b'{"a": nonsense')
    return name


def write_truncated(folder: Path) -> str:
    name = save_tiny_model(folder)
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(60))
    return name


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown backend": ({"attention_backend": "sdpa_vatn"}, r"'vatn' is unknown; the nearest known word is 'vattn'"),
    "page no multiple": ({"attention_backend": "sdpa_vattn_5kb"}, r"multiple of .*4096.*5120"),
    "page too small": ({"attention_backend": "sdpa_vattn_megacache_4kb", "model": "wide"}, r"8192.*4096|4096.*8192"),
    "no such choice": ({"scheduler_type": "sarati"}, r"scheduler\.type is 'sarati'.*nearest is 'sarathi'"),
    "missing folder": ({"model": "/nowhere/at/all"}, r"/nowhere/at/all.*no such folder"),
    "misspelt model": ({"model": "smolm2-135m"}, r"did you mean 'smollm2-135m'"),
    "corrupt weights": ({"model": "broken", "load_format": "auto"}, r"model\.safetensors.*corrupt"),
    "truncated weights": ({"model": "truncated", "load_format": "auto"}, r"model\.safetensors.*corrupt"),
    "no weights": ({"load_format": "auto", "model": "bare"}, r"without weights"),
    "budget below a row": ({"memory_bytes": "1kb"}, r"1024.*262144"),
    "budget beyond the machine": (
        {"attention_backend": "sdpa_paged_16", "memory_bytes": "900tb"},
        r"more than cpu can give",
    ),
    "virtual budget beyond the machine": (
        {"attention_backend": "sdpa_vattn", "memory_bytes": "900tb"},
        r"memory_bytes=\d+ is more than cpu can give: it has \d+ bytes in all",
    ),
    "another dtype in the cache": (
        {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
        r"kv_cache_dtype=bfloat16: .*float32; use auto or float32",
    ),
    "weights beyond the memory": (
        {"model": "llama-3-70b", "dtype": "float32"},
        r"70553706496 parameters x 4 bytes \(float32\) are 262\.8 GiB, cpu has \d+\.\d GiB free",
    ),
    "too many ranks": ({"tensor_parallel_size": 2, "executor": "uniproc"}, r"tensor_parallel_size=2.*one rank"),
    "length beyond the model": (
        {"load_format": "auto", "model": "smollm2-135m", "max_model_len": 10**6},
        r"1000000.*8192",
    ),
    "more addresses than there are": (
        {"attention_backend": "sdpa_vattn", "max_model_len": 10**9, "max_num_seqs": 10**6},
        r"max_num_seqs=1000000, max_model_len=1000000000: .* more addresses than the device has",
    ),
    "no such device": ({"device": "tpu"}, r"device='tpu'"),
}
REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "prompt too long": ("x" * 500, {}, r"500 tokens.*128"),
    "empty prompt": ("", {}, r"prompt is empty"),
    "negative max_tokens": ("hi", {"max_tokens": -3}, r"max_tokens is -3: it must be at least 1"),
    "nan": ("hi", {"temperature": float("nan")}, r"temperature is nan"),
    "unknown stop token": ("hi", {"stop_token_ids": [300]}, r"token id 300: it must be from 0 to 299"),
}
MODELS: dict[str, Callable[[Path], str]] = {
    "bare": save_tiny_config,
    "wide": lambda folder: save_tiny_config(folder, hidden_size=1024, num_attention_heads=8, num_key_value_heads=8),
    "broken": write_broken,
    "truncated": write_truncated,
}


def settings_of(case: str, folder: Path) -> dict[str, Any]:
    changes, _ = SETTINGS[case]
    name = changes.get("model", "tiny")
    known = name if name not in MODELS and "model" in changes else MODELS.get(name, save_tiny_model)(folder)
    return {**KNOBS, **changes, "model": known}


def one_line(text: str) -> str:
    assert "Traceback" not in text and text.count("\n") == 1, text
    return text


def as_words(settings: dict[str, Any]) -> list[str]:
    pairs = (("--" + name.replace("_", "-"), value) for name, value in settings.items())
    return [
        word
        for name, value in pairs
        for word in (name, ",".join(map(str, value)) if isinstance(value, list) else str(value))
    ]


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_in_python(case: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=SETTINGS[case][1]):
        LLM(**settings_of(case, tmp_path / "model"))


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_on_the_command_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = as_words(settings_of(case, tmp_path / "model"))
    assert main(["generate", "hello", *words]) == 1
    shown = capsys.readouterr()
    assert re.search(SETTINGS[case][1], one_line(shown.err)) and shown.out == ""


def test_unknown_keys_name_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"unknown setting 'chunk_sise'; the nearest known is 'scheduler\.chunk_size'"):
        LLM(chunk_sise=3)
    path = tmp_path / "config.yml"
    path.write_text("scheduler:\n  chunk_sise: 3\n")
    assert main(["generate", "hello", "--config", str(path)]) == 1
    assert "'scheduler.chunk_sise'; the nearest known is 'scheduler.chunk_size'" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("case", REQUESTS)
def test_requests_on_the_command_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, params, message = REQUESTS[case]
    words = as_words({**KNOBS, "model": save_tiny_model(tmp_path / "model"), **params})
    assert main(["generate", *words, prompt]) == 1
    assert re.search(message, one_line(capsys.readouterr().err))


def test_requests_in_python_leave_the_engine_alive(tmp_path: Path) -> None:
    with LLM(save_tiny_model(tmp_path / "model"), **{**KNOBS, "load_format": "auto"}) as llm:
        expected = good_answer(llm)
        for prompt, params, message in REQUESTS.values():
            with pytest.raises(ValueError, match=message):
                llm.generate(["good", prompt], SamplingParams(**params), use_tqdm=False)
            assert good_answer(llm) == expected
            llm.engine.core.scheduler.check_integrity()


def good_answer(llm: LLM) -> str:
    return llm.generate("good", SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)[0].outputs[0].text


def test_a_prompt_larger_than_the_cache_is_refused_and_a_smaller_one_runs(tmp_path: Path) -> None:
    two_rows = 2 * 4 * 65536  # a page in K and V of each of two layers, twice
    model = save_tiny_config(tmp_path / "model", max_position_embeddings=4096)
    with LLM(model, **{**KNOBS, "memory_bytes": two_rows}) as llm:
        tokens_that_fit = llm.engine.core.executor.capacity.tokens_in(llm.engine.core.executor.capacity.rows)
        with pytest.raises(ValueError, match=f"{tokens_that_fit + 1} tokens: the whole cache holds {tokens_that_fit}"):
            llm.generate([1] * (tokens_that_fit + 1))
        [output] = llm.generate([1] * (tokens_that_fit - 3), SamplingParams(max_tokens=50), use_tqdm=False)
        assert output.outputs[0].finish_reason == "length"


def test_a_step_that_fails_leaves_the_engine_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(save_tiny_model(tmp_path / "model"), **{**KNOBS, "load_format": "auto"}) as llm:
        expected, launch = good_answer(llm), llm.engine.core.executor.launch
        calls = iter(range(100))

        def fail_third(out: Any) -> Any:
            if next(calls) == 2:
                raise RuntimeError("device lost")
            return launch(out)

        monkeypatch.setattr(llm.engine.core.executor, "launch", fail_third)
        with pytest.raises(RuntimeError, match="device lost"):
            llm.generate(["a", "b"], SamplingParams(max_tokens=20), use_tqdm=False)
        assert good_answer(llm) == expected


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        main(["generate", "hello", "--max-tokens", "-1", "--debug"])


def test_argument_errors_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["generate", "--no-such-option"], ["generate", "--max-tokens", "many"], ["no-such-command"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        one_line(capsys.readouterr().err)
