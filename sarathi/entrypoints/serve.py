"""`sarathi serve`: an HTTP server."""

import argparse

from sarathi.entrypoints.options import config_from, scaling_config_from, server_config_from


def run(args: argparse.Namespace) -> int:
    """Returns 0 after a signal, 1 if the engine died."""
    forced = {} if args.model_name is None else {"model": args.model_name}
    engine, server, scaling = config_from(args, **forced), server_config_from(args), scaling_config_from(args)
    if scaling.uses_ray:
        from sarathi.entrypoints.replicas.server import run as run_replicas

        return run_replicas(engine, server, scaling)
    import uvloop

    if scaling.api_workers > 1:
        from sarathi.entrypoints.workers.supervisor import serve as serve_by_workers

        return uvloop.run(serve_by_workers(engine, server, scaling.api_workers))
    from sarathi.entrypoints.routers import ROUTERS
    from sarathi.entrypoints.server.process.lifecycle import serve

    return uvloop.run(serve(engine, server, ROUTERS))
