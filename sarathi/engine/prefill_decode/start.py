"""Starts the ranks of both engines and connects each rank with its peer in the other engine."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from sarathi.config.knobs import ConfigError
from sarathi.config.schema import EngineConfig
from sarathi.executor.factory import connect, create_executor
from sarathi.executor.ranks.executor import RanksExecutor

PREFILL, DECODE = "prefill", "decode"


def prefill_config(config: EngineConfig) -> EngineConfig:
    """The prefill engine's configuration. ConfigError if `config` does not support disaggregation.

    It runs without CUDA graphs, because it must send each layer as soon as the layer is computed.
    """
    parallel, scheduler = config.parallel, config.scheduler
    if parallel.pipeline_parallel_size > 1:
        size = parallel.pipeline_parallel_size
        raise ConfigError(f"pipeline_parallel_size is {size}: it must be 1 with transfer.prefill_decode")
    if parallel.executor == "uniproc":
        raise ConfigError("executor is 'uniproc': it must be auto, multiproc or ray with transfer.prefill_decode")
    chunk_size = config.transfer.prefill_chunk_size or scheduler.chunk_size
    model, scheduler = replace(config.model, enforce_eager=True), replace(scheduler, chunk_size=chunk_size)
    return replace(config, model=model, scheduler=scheduler)


def start_executors(
    prefill: EngineConfig, config: EngineConfig, make_vocabulary: Any
) -> tuple[RanksExecutor, RanksExecutor, int]:
    """Start the executors of both engines concurrently; return them with the model's number of layers. ValueErrors name
    the setting at fault.

    prefill: see `prefill_config`.
    """
    name = "ray" if config.parallel.executor == "ray" else "multiproc"
    parallel = replace(config.parallel, executor=name)
    sides = (replace(prefill, parallel=parallel), replace(config, parallel=parallel))
    size = parallel.tensor_parallel_size
    connect(parallel)
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(create_executor, side, make_vocabulary, number * size) for number, side in enumerate(sides)
        ]
        first, second = _results(started, lambda executor: executor.shutdown())
        assert isinstance(first, RanksExecutor) and isinstance(second, RanksExecutor)
        first.join(PREFILL, second)
        second.join(DECODE, first)
        try:
            asked = [
                pool.submit(executor.ask, method, second.store)
                for executor, method in ((first, "start_sending"), (second, "start_receiving"))
            ]
            num_layers: int = _results(asked, lambda replies: None)[0][0]
        except BaseException as error:
            for executor in (first, second):
                executor.kill(str(error))
            raise
    return first, second, num_layers


def _results(futures: Sequence[Future[Any]], undo: Callable[[Any], None]) -> list[Any]:
    """The results of all futures. If one failed, undo the others and raise its error."""
    errors = [future.exception() for future in futures]
    for error in filter(None, errors):
        for future in futures:
            if future.exception() is None:
                undo(future.result())
        raise error
    return [future.result() for future in futures]
