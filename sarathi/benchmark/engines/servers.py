"""Our and vLLM's HTTP servers as processes, on one model folder with random weights."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sarathi.benchmark.engines import vllm
from sarathi.parent_death import end_with_parent

NAME = "measured"  # what clients call the model
_END_S = 30.0


@dataclass(frozen=True)
class ServerCommand:
    """backend: name in records. words: command line. settings: extra environment variables."""

    backend: str
    words: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerLimits:
    """max_model_len: prompt plus output tokens. max_num_seqs: running requests. chunk_size: token budget of a step."""

    max_model_len: int
    max_num_seqs: int
    chunk_size: int


class Started(NamedTuple):
    """A server's process id, and the seconds until it was ready."""

    pid: int
    start_s: float


def our_server(folder: Path, port: int, limits: ServerLimits, options: tuple[str, ...] = ()) -> ServerCommand:
    """`sarathi serve` without prefix caching. options: further command-line words, which take precedence."""
    words = (
        sys.executable, "-m", "sarathi", "serve", str(folder), "--load-format", "dummy", "--port", str(port),
        "--served-model-name", NAME, "--max-model-len", str(limits.max_model_len),
        "--max-num-seqs", str(limits.max_num_seqs), "--chunk-size", str(limits.chunk_size),
        "--no-prefix-caching",
    )  # fmt: skip
    return ServerCommand("sarathi", (*words, *options))


def vllm_server(folder: Path, port: int, limits: ServerLimits) -> ServerCommand:
    """vLLM's server with the same limits and no prefix caching. ImportError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vLLM cannot be imported here: pip install vllm")
    words = (
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--load-format", "dummy",
        "--port", str(port), "--host", "127.0.0.1", "--served-model-name", NAME, "--dtype", "bfloat16",
        "--max-model-len", str(limits.max_model_len), "--max-num-seqs", str(limits.max_num_seqs),
        "--max-num-batched-tokens", str(limits.chunk_size), "--no-enable-prefix-caching", "--disable-log-stats",
        "--disable-uvicorn-access-log",
    )  # fmt: skip
    own_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # as vLLM's server has it
    return ServerCommand("vllm", words, {**vllm.SETTINGS, **own_process})


@contextmanager
def running(command: ServerCommand, url: str, log: Path, start_limit_s: float) -> Iterator[Started]:
    """Run the server during the block, with its output in `log`.

    RuntimeError with the end of the log if the server exits or is not ready in time.
    """
    start_s = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command.words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **command.settings},
            preexec_fn=partial(end_with_parent, os.getpid()),
        )  # fmt: skip
    try:
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() - start_s > start_limit_s:
                raise RuntimeError(f"{command.backend} is not ready ({process.poll()=}): {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield Started(process.pid, time.monotonic() - start_s)
    finally:
        _end(process)


def free_port() -> int:
    """An unused TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def save_model(model: str, max_model_len: int, folder: Path) -> Path:
    """Write a shipped configuration, and a tokenizer with one word per id beyond the bytes: any ids are valid text."""
    folder.mkdir(parents=True, exist_ok=True)
    vllm.save_config(model, max_model_len, folder)
    _save_tokenizer(json.loads((folder / "config.json").read_text())["vocab_size"], folder)
    return folder


def _save_tokenizer(vocab_size: int, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"\u0120w{number}" for number in range(vocab_size - len(alphabet) - 1))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            ready: bool = response.status == 200
            return ready
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
