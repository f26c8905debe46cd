"""One replica: an engine and its ASGI application, without a listening socket."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import ray
from ray import serve

from sarathi.config.schema import EngineConfig
from sarathi.config.server import ServerConfig
from sarathi.engine.admission import UNLIMITED, QueueLimits
from sarathi.engine.async_llm import AsyncLLM, Outputs
from sarathi.engine.core_process.link import CoreLink
from sarathi.engine.input_processor import Prompt
from sarathi.engine.outputs import RequestOutput
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.entrypoints.replicas.exchange import CURRENT, Exchange
from sarathi.entrypoints.replicas.messages import ForwardedRequest, Piece, WholeAnswer
from sarathi.entrypoints.replicas.prefix import response_prefix
from sarathi.entrypoints.routers import ROUTERS
from sarathi.entrypoints.server.app import create_app
from sarathi.entrypoints.server.process.log import write_status
from sarathi.entrypoints.server.process.service import make_context
from sarathi.sampling_params import SamplingParams

_DEATH_NOTICE_S = 1.0  # for errors about the engine's death to reach the clients
_FAILED = 1


class EngineGoneError(RuntimeError):
    """The replica's engine died."""

    def __init__(self, replica: str) -> None:
        super().__init__(replica)
        self.replica = replica


class Replica:
    """The Ray Serve actor of a replica. Its process ends with its engine, and Serve starts a new one."""

    async def __init__(self, engine: EngineConfig, config: ServerConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)  # for an engine with executor=ray
        self._name: str = serve.get_replica_context().replica_id.unique_id
        context = await make_context(engine, config, ReplicaLLM.start, response_prefix(self._name))
        self._llm = context.llm
        self._app = create_app(context, replace(config, allowed_origins=None), ROUTERS)
        self._tasks = [asyncio.create_task(self._end_with_engine())]
        if config.log_interval_s is not None:
            self._tasks += [asyncio.create_task(write_status(self._llm.stats, context.metrics, config.log_interval_s))]

    async def stream(self, request: ForwardedRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of the response. EngineGoneError if the engine is dead and the response has not started."""
        exchange = Exchange(self._app, request)
        async with aclosing(exchange.pieces()) as pieces:
            async for each in pieces:
                if self._llm.error is not None and not exchange.has_begun:
                    raise EngineGoneError(self._name)
                yield each

    async def answer(self, request: ForwardedRequest) -> WholeAnswer:
        """The complete response."""
        return await Exchange(self._app, request).whole(self._name)

    async def check_health(self) -> None:
        """Called by Serve every second; Serve replaces a replica that raises or hangs."""
        if self._llm.error is not None:
            raise self._llm.error

    async def _end_with_engine(self) -> None:
        await self._llm.wait_until_dead()
        await asyncio.sleep(_DEATH_NOTICE_S)
        os._exit(_FAILED)


class ReplicaLLM(AsyncLLM):
    """Signals the first token of each request to its exchange."""

    def __init__(
        self, core: CoreLink, tokenizer: Tokenizer | None, end_token_ids: frozenset[int],
        limits: QueueLimits = UNLIMITED, observe: Callable[[RequestOutput], None] = lambda output: None,
    ) -> None:  # fmt: skip
        self._exchanges: dict[str, Exchange] = {}  # of requests without output so far

        def observe_first(output: RequestOutput) -> None:
            exchange = self._exchanges.pop(output.request_id, None)
            if exchange is not None and any(each.num_tokens for each in output.outputs):
                exchange.begin()
            observe(output)

        super().__init__(core, tokenizer, end_token_ids, limits, observe_first)

    async def submit(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None, *,
        priority: int = 0, timeout_s: float | None = None,
    ) -> Outputs:  # fmt: skip
        request_id = next(self._ids) if request_id is None else request_id
        self._exchanges[request_id] = CURRENT.get()
        try:
            return await super().submit(prompt, sampling_params, request_id, priority=priority, timeout_s=timeout_s)
        except BaseException:
            self._exchanges.pop(request_id, None)
            raise
