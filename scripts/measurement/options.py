"""What scripts that run engines are told, and a model small enough to try them on. Knows no script."""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from measurement.figure import as_words, parse_figure

_COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 1000, "intermediate_size": 512,
}  # fmt: skip
_SHAPES = {
    "tiny": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "two-wide-layers": {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8},
}
_TEST = {
    "model": "tiny", "backend": "sdpa_vattn", "device": "cpu", "memory_bytes": "64mb", "max_model_len": 512,
    "max_num_seqs": 8, "chunk_size": 64,
}  # fmt: skip


def find_model(name: str) -> str:
    """The name, or a new folder with the configuration of a small model: random weights, token ids."""
    if name not in _SHAPES:
        return name
    folder = Path(tempfile.mkdtemp(prefix="small-model-"))
    (folder / "config.json").write_text(json.dumps({**_COMMON, **_SHAPES[name]}))
    return str(folder)


def engine_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """What every script that runs engines is told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help=f"a shipped name, or {', '.join(_SHAPES)}")
    parser.add_argument("--backend", default="fa_vattn")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N")
    parser.add_argument("--max-model-len", type=int, default=132_096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--memory-bytes", help="of the KV cache, as 8gb; none: what is free")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds; nothing starts after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the CSV files and plots")
    parser.add_argument("--test", action="store_true", help="a short form on the CPU with a tiny model")
    return parser


def add_stages(parser: argparse.ArgumentParser, stages: Sequence[str]) -> None:
    """Which of these to measure, in which order: all of them where nothing is said."""

    def chosen(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [each for each in found if each not in stages]:
            raise argparse.ArgumentTypeError(f"no stage is called {', '.join(unknown)}; known: {', '.join(stages)}")
        return found

    parser.add_argument("--stages", type=chosen, default=list(stages), help=f"any of {','.join(stages)}")


def add_ratios(parser: argparse.ArgumentParser) -> None:
    """Which static traces to run: the two take minutes each."""
    parser.add_argument(
        "--ratios", type=lambda text: [int(each) for each in text.split(",")], default=[500, 50],
        help="prompt tokens for one output token, of the static traces",
    )  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, test: Mapping[str, object] = MappingProxyType({}), figure: str | None = None
) -> argparse.Namespace:
    """The options. Where the short form is asked for, what that changes stands before what the command line says.

    test: what it changes beside the common, by the options' names. figure: see parse_figure.
    """
    changes = {**_TEST, **test}
    short = [word for name, value in changes.items() for word in as_words(name, [value])]
    if figure is not None:
        return parse_figure(parser, figure, short=short)
    options = parser.parse_args()
    return parser.parse_args([*short, *sys.argv[1:]]) if options.test else options
