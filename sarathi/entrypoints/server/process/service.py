"""One engine as the service of a server: start, drain, kill."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.engine.admission import QueueLimits
from sarathi.engine.async_llm import AsyncLLM
from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.parsing.turn import ModelFormat
from sarathi.entrypoints.server.context import ServerContext
from sarathi.entrypoints.server.metrics import ServerMetrics
from sarathi.entrypoints.server.process.log import RequestLog

Observe = Callable[[RequestOutput], None]


class StartEngine(Protocol):
    """Signature of `AsyncLLM.start`."""

    def __call__(
        self, config: EngineConfig, *, heartbeat_timeout_s: float, limits: QueueLimits, observe: Observe
    ) -> Awaitable[AsyncLLM]: ...


async def make_context(
    engine: EngineConfig, config: ServerConfig, start: StartEngine = AsyncLLM.start, id_prefix: str = "",
    metrics_folder: Path | None = None,
) -> ServerContext:  # fmt: skip
    """Start an engine. id_prefix: see `ServerContext`. The folder: see `ServerMetrics`."""
    names = config.model_names(engine.model.model)
    metrics = ServerMetrics(names[0], metrics_folder)
    llm = await start(
        engine, heartbeat_timeout_s=config.heartbeat_timeout_s,
        limits=QueueLimits(config.max_waiting_requests, config.max_waiting_tokens), observe=_observer(config, metrics),
    )  # fmt: skip
    model_format = ModelFormat.of(llm.tokenizer, config.tool_call_parser, config.reasoning_parser)
    return ServerContext(llm, names, engine.model.model, metrics, model_format, config.request_timeout_s, id_prefix)


class EngineService:
    """The engine of one application."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context

    @classmethod
    async def start(
        cls, engine: EngineConfig, config: ServerConfig, start: StartEngine = AsyncLLM.start,
        metrics_folder: Path | None = None,
    ) -> "EngineService":  # fmt: skip
        """Start the engine with `start`, by default in a new process."""
        return cls(await make_context(engine, config, start, metrics_folder=metrics_folder))

    async def wait_until_dead(self) -> None:
        await self.context.llm.wait_until_dead()

    async def drain(self, timeout_s: float) -> None:
        llm = self.context.llm
        self.context.is_draining = True
        llm.refuse_requests("the server is draining and accepts no new requests")
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(llm.wait_until_idle(), timeout_s)
        await llm.shutdown()  # remaining requests end with an error while their connections are open

    def kill(self) -> None:
        self.context.llm.kill()


def _observer(config: ServerConfig, metrics: ServerMetrics) -> Observe:
    if not config.log_requests:
        return metrics.observe
    log = RequestLog(texts=config.log_texts)

    def observe(output: RequestOutput) -> None:
        metrics.observe(output)
        log.observe(output)

    return observe
