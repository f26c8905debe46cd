"""The `sarathi` command: options, dispatch, and one-line errors.

The module of a command is imported when the command runs: --help does not load torch.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sarathi import __version__
from sarathi.entrypoints import bench
from sarathi.entrypoints.command_parser import Parser
from sarathi.entrypoints.options import add_config_options, add_sampling_options, add_server_options, token_ids
from sarathi.entrypoints.packages import name_extra

_SPIN_COUNT = "3000"  # iterations of libgomp's spin loop, about 15 ns each
_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, by convention of shells


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Errors are one line on stderr and code 1, or a traceback with --debug."""
    args = _parser().parse_args(argv)
    _share_cores()
    try:
        return _command(args.command)(args)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drop output that nobody reads
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"sarathi {args.command}: {_describe(error)}", file=sys.stderr)
        return 1


def _share_cores() -> None:
    """Let waiting torch threads spin for about 50 us before they sleep, unless the environment sets another value.

    Sleeping at once makes two threads no faster than one. Spinning for milliseconds, libgomp's default, is five times
    slower when another process uses the same cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    run: Callable[[argparse.Namespace], int] = importlib.import_module(f"sarathi.entrypoints.{name}").run
    return run


def _describe(error: Exception) -> str:
    """The message of a user error; for other errors also the type and how to see more."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    message = name_extra(error) or " ".join(str(error).split())
    if isinstance(error, (ValueError, ImportError, OSError)) and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _parser() -> Parser:
    parser = Parser(prog="sarathi", description="Run language models with a virtually contiguous KV cache.")
    parser.add_argument("--version", action="version", version=f"sarathi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_chat(commands)
    _add_demo(commands)
    _add_serve(commands)
    _add_command(commands, "env", "show versions of packages and the devices of this machine")
    bench.add_arguments(_add_command(commands, "bench", "measure an engine in this process, or a server under load"))
    return parser


def _add_command(commands: Any, name: str, help_text: str, *examples: str) -> Parser:
    command: Parser = commands.add_parser(name, help=help_text, description=f"{help_text}.", examples=examples)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_generate(commands: Any) -> None:
    command = _add_command(
        commands, "generate", "complete prompts and stream the text",
        'sarathi generate "The capital of France is" --temperature 0 --max-tokens 16',
        'sarathi generate --chat "Name three colours" --json',
        "sarathi generate --prompt-file prompts.txt --model ./folder --attention-backend sdpa_vattn_megacache",
    )  # fmt: skip
    command.add_argument("prompt", nargs="*", help="text to complete; without it, standard input is one prompt")
    command.add_argument("--prompt-file", metavar="FILE", help="one prompt per line; -: standard input")
    command.add_argument("--prompt-token-ids", type=token_ids, metavar="IDS", help="a prompt as token ids: 1,2,3")
    command.add_argument("--chat", action="store_true", help="send each prompt as a user message")
    command.add_argument("--json", action="store_true", help="print one JSON object per finished prompt")
    command.hide([*add_sampling_options(command), *add_config_options(command)])


def _add_chat(commands: Any) -> None:
    command = _add_command(
        commands, "chat", "chat with a model; commands: /exit, /reset, /system TEXT",
        'sarathi chat --system "Answer in one sentence"', "sarathi chat --model ./folder --temperature 0.7",
        "sarathi chat --url http://127.0.0.1:8000",
    )  # fmt: skip
    command.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    url_help = "use this OpenAI-compatible server; its defaults apply to sampling options that are not given"
    command.add_argument("--url", help=url_help)
    key_help = "with --url: file with the API key (default: the variable OPENAI_API_KEY, if set)"
    command.add_argument("--api-key-file", metavar="FILE", help=key_help)
    sampling = add_sampling_options(command, max_tokens=512, temperature=0.2, top_p=0.9)
    command.hide([*sampling, *add_config_options(command)])


def _add_demo(commands: Any) -> None:
    command = _add_command(
        commands, "demo", "answer a dozen prompts, then compare three kinds of KV cache",
        "sarathi demo", "sarathi demo --max-tokens 32 --model ./folder",
    )  # fmt: skip
    command.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens per answer (default: 64)")
    command.hide(add_config_options(command))


def _add_serve(commands: Any) -> None:
    command = _add_command(
        commands, "serve", "serve OpenAI-compatible and Anthropic-compatible APIs over HTTP",
        "sarathi serve smollm2-135m --port 8000", "sarathi serve ./folder --memory-bytes 4gb --api-key secret",
    )  # fmt: skip
    command.add_argument("model_name", nargs="?", metavar="MODEL", help="same as --model")
    add_server_options(command)
    command.hide(add_config_options(command))


if __name__ == "__main__":
    sys.exit(main())
