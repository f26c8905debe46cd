"""A server over an executor that computes nothing, to measure the front end alone."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from functools import partial
from pathlib import Path

from sarathi.benchmark.engines.servers import NAME
from sarathi.config.schema import SchedulerConfig
from sarathi.config.server import ServerConfig
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.core.scheduler import make_scheduler
from sarathi.engine.async_llm import AsyncLLM
from sarathi.engine.core import EngineCore
from sarathi.engine.core_process.client import CoreProcess
from sarathi.engine.tokenizer.load import load_tokenizer
from sarathi.executor.base import Executor
from sarathi.messages import (
    CacheCapacity,
    CompletedStep,
    MemoryStats,
    Resolution,
    SampledToken,
    SchedulerOutput,
    StepResult,
)
from sarathi.model_executor.loader.source import ModelSource

_MAX_MODEL_LEN = 2**13
_ROWS = 2**24


class InstantExecutor(Executor):
    """Steps return at once. The sampled token ids cycle through the vocabulary."""

    max_model_len, token_bytes, max_in_flight = _MAX_MODEL_LEN, 1, 1
    capacity = CacheCapacity(_ROWS, token_bytes=1, page_bytes=1)
    resolution = Resolution("none", "cpu", "float32", 2.0**-23)
    takes_functions = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def launch(self, out: SchedulerOutput) -> CompletedStep:
        token_id = 300 + out.step_id % (self.vocab_size - 400)
        tokens = tuple([SampledToken(chunk.request_id, token_id) for chunk in out.chunks if chunk.samples])
        return CompletedStep(StepResult(out.step_id, tokens))

    def wait(self) -> None:
        """Nothing is running."""

    def memory_stats(self) -> MemoryStats:
        return MemoryStats()

    def resize_cache(self, rows: int) -> bool:
        return True

    def drop_weights(self) -> None:
        """There are no weights."""

    load_weights = drop_weights

    def check_integrity(self) -> None:
        """There is no cache."""

    def shutdown(self) -> None:
        """There is nothing to release."""


def make_core(vocab_size: int) -> EngineCore:
    """The real scheduler over an InstantExecutor."""
    config = SchedulerConfig(max_num_seqs=256, chunk_size=8192)
    executor = InstantExecutor(vocab_size)
    return EngineCore(make_scheduler(config, VirtualBlockSpaceManager(executor.capacity), _MAX_MODEL_LEN), executor)


async def serve(folder: Path, port: int) -> None:
    """Serve until SIGTERM."""
    from sarathi.entrypoints.openai import ROUTERS
    from sarathi.entrypoints.parsing.turn import ModelFormat
    from sarathi.entrypoints.server.app import create_app
    from sarathi.entrypoints.server.context import ServerContext
    from sarathi.entrypoints.server.metrics import ServerMetrics
    from sarathi.entrypoints.server.process.connections import make_http_server

    tokenizer = load_tokenizer(ModelSource(str(folder), "safetensors", folder))
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    metrics, config = ServerMetrics(NAME), ServerConfig(max_waiting_requests=None)
    llm = AsyncLLM(
        await CoreProcess.start(partial(make_core, vocab_size)), tokenizer, frozenset(), observe=metrics.observe
    )
    context = ServerContext(llm, (NAME,), NAME, metrics, ModelFormat.of(tokenizer, "auto", "auto"))
    server = make_http_server(create_app(context, config, ROUTERS), config)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, setattr, server, "should_exit", True)
    with socket.create_server(("127.0.0.1", port), backlog=2048) as listener:
        await server.serve(sockets=[listener])
    await llm.shutdown()


def main() -> None:
    """Arguments: a folder with config.json and a tokenizer, and a port."""
    import uvloop

    uvloop.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
