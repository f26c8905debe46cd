"""The readers of user files that are fuzzed. Each reads one broken file in a folder."""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.experiment.plan import read_experiment
from sarathi.benchmark.workload.generate import read_arrivals
from sarathi.benchmark.workload.lengths import read_lengths
from sarathi.config.load import load_config
from sarathi.config.schema import EngineConfig, ModelConfig
from sarathi.engine.tokenizer.load import load_end_token_ids, load_tokenizer
from sarathi.model_executor.loader.loader import open_checkpoint
from sarathi.model_executor.loader.source import ModelSource, resolve_model

TEXT = "Hello, wörld 123\n\n"


class Reader(NamedTuple):
    """read: takes the broken file. is_text: whether its seeds are JSON, YAML or lines, which are mutated as such."""

    read: Callable[[Path], None]
    is_text: bool = True


def read_gguf(path: Path) -> None:
    """Tokenizer, end tokens, architecture and every tensor."""
    source = ModelSource("fuzz", "gguf", path)
    load_end_token_ids(source)
    tokenizer = load_tokenizer(source)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode(TEXT))
    tensors = open_checkpoint(ModelConfig(model=str(path))).tensors
    assert tensors is not None and all(named.tensor.dtype == torch.float32 for named in tensors)


def read_config(path: Path) -> None:
    """config.json: the architecture, and its end tokens."""
    folder = path.parent
    open_checkpoint(ModelConfig(model=str(folder), load_format="dummy"))
    load_end_token_ids(resolve_model(str(folder), weights=False))


def read_index(path: Path) -> None:
    """model.safetensors.index.json beside two shards."""
    folder = path.parent
    if not (folder / "a.safetensors").exists():
        save_file({"model.embed_tokens.weight": torch.ones(300, 32)}, folder / "a.safetensors")
        save_file({"model.norm.weight": torch.ones(32)}, folder / "b.safetensors")
        (folder / "config.json").write_text((SEEDS / "config" / "llama.json").read_text())
    tensors = open_checkpoint(ModelConfig(model=str(folder))).tensors
    assert tensors is not None and sum(1 for _ in tensors) <= 2


def read_shard(path: Path) -> None:
    """A safetensors file."""
    folder = path.parent
    (folder / "config.json").write_text((SEEDS / "config" / "llama.json").read_text())
    tensors = open_checkpoint(ModelConfig(model=str(folder))).tensors
    assert tensors is not None
    sum(named.tensor.numel() for named in tensors)


def read_tokenizer(path: Path) -> None:
    """tokenizer.json, tokenizer_config.json or generation_config.json beside whole ones of the others."""
    folder = path.parent
    whole = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "generation_config.json": "{}", "config.json": "{}"}
    for name, content in whole.items():
        seed = SEEDS / "tokenizer" / name
        if name != path.name:
            (folder / name).write_text(seed.read_text() if seed.exists() else content)
    tokenizer = load_tokenizer(ModelSource("fuzz", "safetensors", folder))
    assert tokenizer is not None
    tokenizer.decode(tokenizer.encode(TEXT))


def read_yaml(path: Path) -> None:
    """An experiment's file, or the configuration of an engine or a benchmark."""
    if path.name.startswith("experiment"):
        read_experiment(path)
        return
    with suppress(ValueError):
        load_config(BenchmarkConfig, path)
    load_config(EngineConfig, path)


def read_trace(path: Path) -> None:
    """Lengths, or arrival times."""
    if path.name.startswith("arrivals"):
        read_arrivals(str(path))
    else:
        read_lengths(str(path), len)


SEEDS = Path(__file__).parent / "seeds"
READERS = {
    "gguf": Reader(read_gguf, is_text=False),
    "shard": Reader(read_shard, is_text=False),
    "index": Reader(read_index),
    "config": Reader(read_config),
    "tokenizer": Reader(read_tokenizer),
    "yaml": Reader(read_yaml),
    "trace": Reader(read_trace),
}
FILE_NAMES = {"index": "model.safetensors.index.json", "config": "config.json", "shard": "model.safetensors"}


def read_bytes(name: str, content: bytes, seed: Path) -> None:
    """Lets the reader `name` read `content`, a broken copy of `seed`."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder) / FILE_NAMES.get(name, seed.name.split("@")[-1])
        path.write_bytes(content)
        READERS[name].read(path)


def seeds_of(name: str) -> list[Path]:
    """Files from which a reader's inputs are made; those of earlier failures are named `found-...@file`."""
    return sorted(path for path in (SEEDS / name).iterdir() if path.is_file())


def json_of(content: bytes) -> object:
    """The content as JSON; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
