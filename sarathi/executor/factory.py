"""Creates the executor that a configuration asks for."""

from typing import Any

from sarathi.config.schema import EngineConfig, ParallelConfig
from sarathi.executor.base import Executor
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.model_executor.sampling.grammar import MakeVocabulary, no_vocabulary


class MissingPackageError(ValueError):
    """An executor needs a package that is not installed; the message names it."""


def create_executor(
    config: EngineConfig, make_vocabulary: MakeVocabulary = no_vocabulary, first_device: int = 0
) -> Executor:
    """parallel.executor; "auto" is a process for each rank where there are several. ValueErrors name the setting.

    make_vocabulary: for grammars; a function that pickle can send. first_device: CUDA device of rank 0, where ranks are
    processes of this machine.
    """
    parallel = config.parallel
    num_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if parallel.executor == "ray":
        executor: Executor = _ray_executor().RayExecutor(config, make_vocabulary)
        return executor
    if parallel.executor == "uniproc" or (parallel.executor == "auto" and num_ranks == 1):
        return UniprocExecutor(config, make_vocabulary)
    from sarathi.executor.ranks.multiproc import MultiprocExecutor  # one rank needs no torch.distributed

    return MultiprocExecutor(config, make_vocabulary, first_device)


def connect(parallel: ParallelConfig) -> None:
    """To what executors that start in threads share. Ray's own processes end with the thread that starts them: this one
    must live as long as the executors."""
    if parallel.executor == "ray":
        _ray_executor().connect()


def _ray_executor() -> Any:
    """The module of it."""
    try:
        from sarathi.executor.ray import executor
    except ImportError as error:
        raise MissingPackageError(f"executor=ray: {error}; pip install 'sarathi-vattention[ray]'") from error
    return executor
