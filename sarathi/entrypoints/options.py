"""Command-line options for every knob of the configuration and every field of SamplingParams.

Configuration options come from the schema itself: each knob is an option.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from sarathi.config.knobs import Knob, knobs_of
from sarathi.config.load import load_config
from sarathi.config.scaling import ScalingConfig
from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.sampling_params import SamplingParams

# Destinations in the namespace, apart from a command's own options.
_CONFIG_PREFIX, _SERVER_PREFIX, _SCALING_PREFIX = "config:", "server:", "scaling:"
_SAMPLING_DEFAULTS = "sampling:defaults"


def _optional_int(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor none") from None


_SAMPLING: dict[str, tuple[Callable[[str], object], str]] = {
    "n": (int, "answers to each prompt"),
    "temperature": (float, "0: always the most likely token (greedy); higher: more random"),
    "top_p": (float, "sample from the most likely tokens with this total probability"),
    "top_k": (int, "sample from this many of the most likely tokens; -1: all"),
    "min_p": (float, "sample from tokens with at least this probability relative to the most likely one"),
    "presence_penalty": (float, "subtracted once from the logits of tokens in the output so far"),
    "frequency_penalty": (float, "subtracted once per occurrence in the output so far"),
    "repetition_penalty": (float, "penalizes the logits of tokens in the prompt or the output so far"),
    "seed": (int, "makes sampling repeatable"),
    "max_tokens": (_optional_int, "maximum tokens per answer; none: the model's limit"),
    "min_tokens": (int, "minimum tokens per answer"),
    "logprobs": (int, "return log probabilities of this many of the most likely tokens"),
    "prompt_logprobs": (int, "the same for the prompt's tokens"),
}
_SAMPLING_LISTS = {
    "stop": ("TEXT", "stop before this text; repeatable"),
    "bad_words": ("TEXT", "never generate this text; repeatable"),
    "stop_token_ids": ("IDS", "stop at any of these tokens: 2,198"),
    "allowed_token_ids": ("IDS", "generate only these tokens: 2,198"),
}
_SAMPLING_SWITCHES = {
    "ignore_eos": "continue after the model's end-of-sequence token",
    "include_stop_str_in_output": "keep the stop string, or the text of the stop token, in the answer",
    "skip_special_tokens": "omit special tokens from the text",
    "spaces_between_special_tokens": "keep the spaces that the tokenizer puts between special tokens",
    "detokenize": "decode tokens to text",
}


def add_config_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add one option per knob, and --config for a YAML file that options override. Returns all but --model."""
    group = parser.add_argument_group("engine")
    file_help = "YAML file with sections model, cache, scheduler, parallel, transfer"
    options = [group.add_argument("--config", metavar="FILE", help=file_help)]
    options += [_add_knob(group, name, _CONFIG_PREFIX, knob) for name, knob in _named_knobs()]
    return [option for option in options if "--model" not in option.option_strings]


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per knob of the HTTP server and its processes."""
    for title, prefix, section in (
        ("server", _SERVER_PREFIX, ServerConfig),
        ("scaling", _SCALING_PREFIX, ScalingConfig),
    ):
        group = parser.add_argument_group(title)
        for knob in knobs_of(section):
            _add_knob(group, knob.leaf, prefix, knob)


def config_from(args: argparse.Namespace, **forced: object) -> EngineConfig:
    """The engine configuration of the options; `forced` knobs override them. Raises ConfigError."""
    return load_config(EngineConfig, args.config, {**_given(args, _CONFIG_PREFIX), **forced})


def given_config(args: argparse.Namespace) -> dict[str, Any]:
    """The engine knobs given on the command line, by path; "config" is the file."""
    file = {} if args.config is None else {"config": args.config}
    return file | _given(args, _CONFIG_PREFIX)


def server_config_from(args: argparse.Namespace) -> ServerConfig:
    """The server configuration of the options. Raises ConfigError."""
    return load_config(ServerConfig, overrides=_given(args, _SERVER_PREFIX))


def scaling_config_from(args: argparse.Namespace) -> ScalingConfig:
    """The configuration of processes and replicas. Raises ConfigError."""
    return load_config(ScalingConfig, overrides=_given(args, _SCALING_PREFIX))


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: object) -> list[argparse.Action]:
    """Add and return one option per field of SamplingParams. defaults: of this command."""
    standard = {field.name: field.default for field in fields(SamplingParams)} | defaults
    parser.set_defaults(**{_SAMPLING_DEFAULTS: defaults})
    group = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    options: list[argparse.Action] = []
    for name, (kind, help_text) in _SAMPLING.items():
        shown = f"{help_text} (default: {standard[name]})"
        options.append(group.add_argument(_flag(name), type=kind, metavar="VALUE", help=shown))
    for name, (metavar, help_text) in _SAMPLING_LISTS.items():
        reading: dict[str, Any] = {"action": "append"} if metavar == "TEXT" else {"type": token_ids}
        options.append(group.add_argument(_flag(name), metavar=metavar, help=help_text, **reading))
    for name, help_text in _SAMPLING_SWITCHES.items():
        shown = f"{help_text} (default: {standard[name]})"
        options.append(group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=shown))
    return options


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of the options. Raises ValueError."""
    return SamplingParams(**{**getattr(args, _SAMPLING_DEFAULTS), **given_sampling(args)})


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams given on the command line."""
    names = [*_SAMPLING, *_SAMPLING_LISTS, *_SAMPLING_SWITCHES]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def token_ids(text: str) -> list[int]:
    """Parse token ids such as 1,2,3."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _add_knob(group: Any, name: str, prefix: str, knob: Knob) -> argparse.Action:
    help_text = f"{knob.help} (default: {knob.default}; {knob.allowed})".replace("%", "%%")
    more = {"action": argparse.BooleanOptionalAction} if knob.value_type is bool else {"metavar": "VALUE"}
    option: argparse.Action = group.add_argument(_flag(name), dest=prefix + knob.path, help=help_text, **more)
    return option


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(args: argparse.Namespace, prefix: str) -> dict[str, object]:
    return {
        name.removeprefix(prefix): value
        for name, value in vars(args).items()
        if name.startswith(prefix) and value is not None
    }


def _named_knobs() -> Iterator[tuple[str, Knob]]:
    """Option names: the last part of a knob's path, or the last two if one is unclear or ambiguous."""
    knobs = knobs_of(EngineConfig)
    leaves = [knob.leaf for knob in knobs]
    for knob in knobs:
        ambiguous = knob.leaf in _SAMPLING or knob.leaf in ("type", "policy") or leaves.count(knob.leaf) > 1
        yield (knob.tail if ambiguous else knob.leaf), knob
