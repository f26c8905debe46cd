"""Compile Triton kernels in parallel processes, into Triton's shared cache."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable


def warm_up(make_jobs: Callable[[], Iterable[Callable[[], None]]], processes: int) -> None:
    """Run the thunks of ``make_jobs()`` in child processes. Call it before this process initializes CUDA."""
    start = time.monotonic()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_run_share, args=(make_jobs, index, processes)) for index in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    print(f"# kernels compiled in {time.monotonic() - start:.0f} s by {processes} processes", flush=True)


def processes_at_hand() -> int:
    """Number of processes: one per available core, at most 12, since each holds a CUDA context."""
    return min(12, len(os.sched_getaffinity(0)))


def _run_share(make_jobs: Callable[[], Iterable[Callable[[], None]]], index: int, processes: int) -> None:
    for number, job in enumerate(make_jobs()):
        if number % processes == index:
            try:
                job()
            except Exception as problem:  # the measurement itself will meet it again and report it
                print(f"# warm-up: {type(problem).__name__}: {str(problem)[:160]}", flush=True)
