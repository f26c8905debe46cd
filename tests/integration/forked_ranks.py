"""Ranks forked from a process that has imported torch: a start takes a tenth of a second and not two.

A rank is otherwise as the executor starts it: a session of its own, the same program, descriptors and environment.
"""

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from typing import Any

from sarathi.executor.ranks import multiproc

start_interpreter = multiproc._start_interpreter  # as the product starts a rank
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sarathi.executor.ranks.process"])


class ForkedRank:
    """In place of the `subprocess.Popen` of a rank."""

    def __init__(self, inherited: Sequence[int], environment: Mapping[str, str]) -> None:
        copies = [_Descriptor(each) for each in inherited]
        arguments = (multiproc._PROGRAM, sys.path, copies, dict(environment))
        self._process = _CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self._waiting = threading.Lock()  # the exit code comes once, to the thread that asks first
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with self._waiting:
            return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        with self._waiting:
            self._process.join()
            return self._process.exitcode


class _Descriptor:
    """Arrives in the process as the number of a copy."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _number_of, (DupFd(self._number),)


def _number_of(copy: Any) -> int:
    return copy.detach()


def _run(program: str, path: list[str], descriptors: list[int], environment: dict[str, str]) -> None:
    os.setsid()
    gc.freeze()  # a rank that starts collects its garbage, and need not search all modules for it
    os.environ.clear()
    os.environ.update(environment)
    exec(program.format(path=path, descriptors=tuple(descriptors)))
