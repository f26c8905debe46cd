"""The executor's interface: all ranks of an engine, one message in and one result out for each step."""

from typing import Protocol

from sarathi.messages import CacheCapacity, MemoryStats, Resolution, SchedulerOutput, StepFuture


class Executor(Protocol):
    """Runs the scheduler's steps on every rank.

    A step is two calls on each rank: `prepare` maps memory for the step's tokens and may report a shortage; `run`
    computes. No rank runs unless every rank has prepared.
    """

    capacity: CacheCapacity  # rows of KV cache that the block space manager may allocate: the minimum over ranks
    vocab_size: int  # token ids are in [0, vocab_size)
    max_model_len: int  # tokens of the longest request, prompt and output together
    token_bytes: int  # of one token's keys and values, in all layers of all ranks
    resolution: Resolution  # backend, device and dtype
    num_stages: int = 1  # of the pipeline; with several, a request's next token waits for the last one's value
    max_in_flight: int  # steps that may be launched before the first one's result is processed
    health_check_interval_s: float | None = None  # between two calls of `check_health` without work; None: none needed
    takes_functions: bool  # whether requests may have logits processors, which are functions of this process

    def launch(self, out: SchedulerOutput) -> StepFuture:
        """Start one step. A step that lacks memory computes nothing; its result then has `available_rows`."""

    def check_health(self) -> None:
        """Raise RankError if a rank has died or hangs, as a step would."""
        return

    def wait(self) -> None:
        """Return once no launched step is running, including steps whose futures were lost."""

    def memory_stats(self) -> MemoryStats:
        """Memory of the KV cache now, summed over ranks."""

    def resize_cache(self, rows: int) -> bool:
        """Change the cache's physical memory on every rank; False if requests still use more: then call it again.

        rows: of `capacity`; 0 keeps one row, the minimum of a cache. Only a virtual cache changes its size.
        """

    def drop_weights(self) -> None:
        """Give the weights' memory back to the system on every rank. No step may run until `load_weights`.

        On a GPU only with `resolution.mapped_weights`: CUDA graphs contain the weights' addresses.
        """

    def load_weights(self) -> None:
        """Read the weights from the checkpoint again if they were dropped; raises what a new executor would."""

    def check_integrity(self) -> None:
        """Raise RuntimeError if a cache's accounting is inconsistent."""

    def shutdown(self) -> None:
        """Release model and cache of every rank. Idempotent; `launch` raises RuntimeError afterwards."""
