"""Messages between the supervisor and an API process."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig

READY, ALIVE = b"r", b"."
"""Sent to the supervisor when the process accepts connections, then every BEAT_S as a heartbeat."""
BEAT_S = 0.5


@dataclass(frozen=True)
class WorkerSetup:
    """name: of its connection to the core. core_folder: of the core's sockets. core_life: see `CoreConnection`.

    port: of the server, reserved by the supervisor's socket. metrics_folder: of the shared counters.
    """

    engine: EngineConfig
    server: ServerConfig
    name: str
    core_folder: Path
    core_life: int
    port: int
    metrics_folder: Path


def share_of(config: ServerConfig, count: int) -> ServerConfig:
    """The limits of one of `count` processes: an equal share, rounded up. Only the supervisor logs status lines."""

    def part(limit: int | None) -> int | None:
        return None if limit is None else math.ceil(limit / count)

    return replace(
        config, max_waiting_requests=part(config.max_waiting_requests),
        max_waiting_tokens=part(config.max_waiting_tokens),
        max_connections=math.ceil(config.max_connections / count), log_interval_s=None,
    )  # fmt: skip
