"""The `sarathi` command: options, dispatch, and errors as one line.

Commands live in modules of their own, imported when called, so that --help needs neither torch nor a model.
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

_SPIN_COUNT = "3000"  # looks of a waiting thread of libgomp, which take about 15 ns each
_INTERRUPTED = 130  # what shells expect of a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors are one line on stderr and exit code 1, or a traceback with --debug."""
    args = _parser().parse_args(argv)
    _share_cores()
    try:
        return _command(args.command)(args)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to flush
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"sarathi {args.command}: {_describe(error)}", file=sys.stderr)
        return 1


def _share_cores() -> None:
    """Threads of torch that wait for each other spin for about 50 us, then sleep; the environment may say otherwise.

    Two threads that sleep at once are no faster than one. Where another process wants the same cores, two that spin
    for milliseconds, as is libgomp's default, lose a factor of five.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    run: Callable[[argparse.Namespace], int] = importlib.import_module(f"sarathi.entrypoints.{name}").run
    return run


def _describe(error: Exception) -> str:
    """Errors about what the user asked for speak for themselves; others need their type, and a way to learn more."""
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
    _add_command(commands, "env", "versions of packages and devices of this machine")
    bench.add_arguments(_add_command(commands, "bench", "measure an engine in this process, or a server under load"))
    return parser


def _add_command(commands: Any, name: str, help_text: str, *examples: str) -> Parser:
    command: Parser = commands.add_parser(name, help=help_text, description=f"{help_text}.", examples=examples)
    command.add_argument("--debug", action="store_true", help="show where an error came from")
    return command


def _add_generate(commands: Any) -> None:
    command = _add_command(
        commands, "generate", "complete prompts, printing text as it comes",
        'sarathi generate "The capital of France is" --temperature 0 --max-tokens 16',
        'sarathi generate --chat "Name three colours" --json',
        "sarathi generate --prompt-file prompts.txt --model ./folder --attention-backend sdpa_vattn_megacache",
    )  # fmt: skip
    command.add_argument("prompt", nargs="*", help="text to complete; none: all of standard input is one prompt")
    command.add_argument("--prompt-file", metavar="FILE", help="one prompt a line; - is standard input")
    command.add_argument("--prompt-token-ids", type=token_ids, metavar="IDS", help="a prompt as token ids: 1,2,3")
    command.add_argument("--chat", action="store_true", help="put each prompt to the model as a user's message")
    command.add_argument("--json", action="store_true", help="print one JSON object a prompt, when it is done")
    command.hide([*add_sampling_options(command), *add_config_options(command)])


def _add_chat(commands: Any) -> None:
    command = _add_command(
        commands, "chat", "talk with a model; /exit, /reset and /system TEXT are commands",
        'sarathi chat --system "Answer in one sentence"', "sarathi chat --model ./folder --temperature 0.7",
        "sarathi chat --url http://127.0.0.1:8000",
    )  # fmt: skip
    command.add_argument("--system", metavar="TEXT", help="system message that the conversation begins with")
    url_help = "an OpenAI-compatible server to talk to; it decides about sampling where no option does"
    command.add_argument("--url", help=url_help)
    key_help = "url: file with the API key (default: the variable OPENAI_API_KEY, where it is set)"
    command.add_argument("--api-key-file", metavar="FILE", help=key_help)
    sampling = add_sampling_options(command, max_tokens=512, temperature=0.2, top_p=0.9)
    command.hide([*sampling, *add_config_options(command)])


def _add_demo(commands: Any) -> None:
    command = _add_command(
        commands, "demo", "answer a dozen prompts, then compare three kinds of KV cache on them",
        "sarathi demo", "sarathi demo --max-tokens 32 --model ./folder",
    )  # fmt: skip
    command.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    command.hide(add_config_options(command))


def _add_serve(commands: Any) -> None:
    command = _add_command(
        commands, "serve", "answer requests over HTTP, as OpenAI's API does",
        "sarathi serve smollm2-135m --port 8000", "sarathi serve ./folder --memory-bytes 4gb --api-key secret",
    )  # fmt: skip
    command.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    add_server_options(command)
    command.hide(add_config_options(command))


if __name__ == "__main__":
    sys.exit(main())
