"""Creates the executor that a configuration asks for."""

from sarathi.config.schema import EngineConfig
from sarathi.executor.base import Executor
from sarathi.executor.uniproc import UniprocExecutor


class MissingPackageError(ValueError):
    """An executor needs a package that is not installed; the message names it."""


def create_executor(config: EngineConfig) -> Executor:
    """parallel.executor; "auto" is a process for each rank where there are several. ValueErrors name the setting."""
    parallel = config.parallel
    num_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if parallel.executor == "ray":
        return _create_ray_executor(config)
    if parallel.executor == "uniproc" or (parallel.executor == "auto" and num_ranks == 1):
        return UniprocExecutor(config)
    from sarathi.executor.multiproc import MultiprocExecutor  # one rank needs no torch.distributed

    return MultiprocExecutor(config)


def _create_ray_executor(config: EngineConfig) -> Executor:
    try:
        from sarathi.executor.ray.executor import RayExecutor
    except ImportError as error:
        raise MissingPackageError(f"executor=ray: {error}; pip install 'sarathi-vattention[ray]'") from error
    return RayExecutor(config)
