"""`sarathi serve`: an HTTP server over the engine."""

import argparse

from sarathi.entrypoints.options import config_from, server_config_from


def run(args: argparse.Namespace) -> int:
    """Exit code 0 after a signal, 1 where the engine died."""
    import uvloop

    from sarathi.entrypoints import anthropic, openai, responses
    from sarathi.entrypoints.server.process.lifecycle import serve

    routers = (*openai.ROUTERS, *responses.ROUTERS, *anthropic.ROUTERS)
    forced = {} if args.model_name is None else {"model": args.model_name}
    return uvloop.run(serve(config_from(args, **forced), server_config_from(args), routers))
